"""The network, or the chunk of it that one pipeline stage holds. What a layer is made of, the config says by kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule

from moe_train.model.attention import ATTENTION
from moe_train.model.attention_core import LayerCache
from moe_train.model.config import ModelConfig
from moe_train.model.depth import DepthGate
from moe_train.model.documents import document_mask, document_numbers, document_positions
from moe_train.model.head import VocabularyHead
from moe_train.model.kernels import kernels_of
from moe_train.model.mlp import MLP
from moe_train.model.options import ModelOptions
from moe_train.model.parameters import initialize, new_parameter
from moe_train.model.rope import rotary_table
from moe_train.model.tokens import Tokens
from parallel.placement import Placement, place
from parallel.topology import Topology
from parallel.transformer_engine import precision_context
from parallel.turns import Steps, finish, in_turn


class Layer(torch.nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: a computation that takes turns
    (:mod:`parallel.turns`). A gated layer (:mod:`moe_train.model.depth`) does it to some of its tokens, and weights
    both sums."""

    def __init__(self, index: int, config: ModelConfig, engine, topology: Topology, options: ModelOptions):
        super().__init__()
        self.index = index
        name, norm = f"layers.{index}", (config.hidden_size, config.layer_norm_eps, topology, options.dtype)
        new_norm = kernels_of(options).norm
        gated = config.depth is not None and config.depth.gates(index)
        self.depth_gate = DepthGate(f"{name}.depth_gate", config, topology, options) if gated else None
        self.attention_norm = new_norm(f"{name}.attention_norm", *norm)
        self.attention = ATTENTION[config.attention.kind](f"{name}.attention", config, engine, topology, options)
        self.mlp_norm = new_norm(f"{name}.mlp_norm", *norm)
        self.mlp = MLP[config.mlp.kind](f"{name}.mlp", config, engine, topology, options)

    def forward(self, x_sbh: torch.Tensor, tokens: Tokens, cache: LayerCache | None = None) -> Steps[torch.Tensor]:
        if self.depth_gate is None:
            x_sbh = x_sbh + (yield from self.attention(self.attention_norm(x_sbh), tokens, cache))
            return x_sbh + (yield from self.mlp(self.mlp_norm(x_sbh), tokens))
        gates_t1, chosen = self.depth_gate(x_sbh, tokens)
        some, gate = chosen.take(x_sbh.flatten(0, 1)), chosen.take(gates_t1)
        some = some + gate * (yield from self.attention(self.attention_norm(some), chosen, cache))
        some = some + gate * (yield from self.mlp(self.mlp_norm(some), chosen))
        return chosen.put_back(some, x_sbh)


class Transformer(MegatronModule):
    """One stage of the network.

    Called with token ids ``[B, S]``, it returns: on the last stage the mean loss and each token's, given labels, else
    fp32 logits ``[B, S, V]`` (``last_only``: ``[B, 1, V]``, those after the last token); on an earlier stage hidden
    states ``[S / TP, B, H]`` for the next. With several ``micro_batches`` the sequences are those of as many, which the
    layers take in turn: one computes while the other's rows travel. Stages after the first take their input through
    :meth:`set_input_tensor`, as megatron-core's schedules hand it over, but still need the ids for their shape. Any S
    will do: under sequence parallelism it is padded to a multiple of the tensor ranks inside.
    """

    def __init__(self, config: ModelConfig, engine, topology: Topology, options: ModelOptions, virtual_stage: int = 0):
        super().__init__(engine)
        self.model_config, self.topology, self.options = config, topology, options
        self.kernels = kernels_of(options)
        self.vp_stage = virtual_stage if topology.virtual_stages > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = topology.is_first_stage(virtual_stage)
        self.post_process = topology.is_last_stage(virtual_stage)
        self.share_embeddings_and_output_weights = config.tie_embeddings
        self.input_tensor = None
        if self.pre_process:
            self.embedding = self._embedding(engine)
        self.layers = torch.nn.ModuleList(
            Layer(index, config, engine, topology, options)
            for index in topology.stage_layers(config.num_layers, virtual_stage)
        )
        if self.post_process:
            self.final_norm = self.kernels.norm(
                "final_norm", config.hidden_size, config.norm_eps, topology, options.dtype
            )
            self.head = VocabularyHead(self._head_weight(), config.vocab_size, topology)
        if options.initialize and topology.device.type != "meta":
            for parameter in self.parameters():
                initialize(parameter, seed=options.seed, std=config.init_std)

    # ---- what megatron-core's schedules and gradient reduction ask of a model

    def set_input_tensor(self, input_tensor) -> None:
        """Take the previous stage's output (a list of one tensor, as the schedules send it)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
        """The weight whose gradients first and last stage add up, where embedding and head are tied."""
        if self.pre_process:
            return self.embedding.weight
        return self.head_weight if self.post_process else None

    # ---- the forward pass

    def forward(
        self,
        ids_bs: torch.Tensor,
        labels_bs: torch.Tensor | None = None,
        caches: list[LayerCache] | None = None,
        first_position: int = 0,
        last_only: bool = False,
        micro_batches: int = 1,
    ):
        length = ids_bs.shape[1]
        tensor_ranks = self.topology.layout.tensor
        padded = -(-length // tensor_ranks) * tensor_ranks
        ids_bs = F.pad(ids_bs, (0, padded - length))
        if self.pre_process:
            x_sbh = self.embedding(ids_bs)
            x_sbh = x_sbh if tensor_ranks > 1 else x_sbh.transpose(0, 1).contiguous()
        else:
            x_sbh = self.input_tensor
        parts = zip(ids_bs.chunk(micro_batches), x_sbh.chunk(micro_batches, dim=1))
        with precision_context(self.config):
            outputs = in_turn(
                [self._through_layers(x, ids, length, caches, first_position, micro_batches) for ids, x in parts]
            )
        x_sbh = outputs[0] if micro_batches == 1 else torch.cat(outputs, dim=1)
        if not self.post_process:
            return x_sbh
        x_sbh = self.final_norm(x_sbh)
        if labels_bs is not None:
            return self.head.loss(x_sbh, labels_bs)
        return self.head.logits(x_sbh, length, length - 1 if last_only else 0)

    def _through_layers(
        self,
        x_sbh: torch.Tensor,
        ids_bs: torch.Tensor,
        length: int,
        caches: list[LayerCache] | None,
        first_position: int,
        micro_batches: int,
    ) -> Steps[torch.Tensor]:
        """One micro-batch of ``micro_batches``, padded from ``length``."""
        padded, attention, document_end = ids_bs.shape[1], self.model_config.attention, self.options.document_end
        documents = mask = None
        if document_end is None:
            positions = torch.arange(first_position, first_position + padded, device=x_sbh.device)
        else:
            documents = document_numbers(ids_bs, document_end)
            mask = document_mask(documents, x_sbh.dtype, attention.queries_per_kv_head)
            positions = document_positions(ids_bs, document_end)
        first = self.topology.tensor_rank * padded // self.topology.layout.tensor
        rotary = rotary_table(positions, attention.head_dim, self.model_config.rope_theta, x_sbh.dtype)
        tokens = Tokens(len(ids_bs), length, first, micro_batches, rotary, documents, mask)
        for number, layer in enumerate(self.layers):
            if self.options.recompute == "full" and torch.is_grad_enabled():
                x_sbh = self.kernels.recompute(self.config, lambda x, layer=layer: finish(layer(x, tokens)), x_sbh)
            else:
                x_sbh = yield from layer(x_sbh, tokens, caches[number] if caches else None)
        return x_sbh

    # ---- vocabulary-parallel parameters

    def _vocabulary(self) -> dict:
        """The part of the vocabulary on this tensor rank, padded so that every rank has as many rows."""
        vocab, ranks = self.model_config.vocab_size, self.topology.layout.tensor
        rows = -(-vocab // ranks)
        first = min(self.topology.tensor_rank * rows, vocab)
        hidden = self.model_config.hidden_size
        return {
            "global_shape": (vocab, hidden),
            "offset": (first, 0),
            "shape": (min(rows, vocab - first), hidden),
            "local_shape": (rows, hidden),
        }

    def _embedding(self, engine) -> VocabParallelEmbedding:
        part = self._vocabulary()
        ranks = self.topology.layout.tensor
        embedding = VocabParallelEmbedding(
            part["local_shape"][0] * ranks,
            self.model_config.hidden_size,
            init_method=None,
            reduce_scatter_embeddings=ranks > 1,
            config=engine,
            tp_group=self.topology.groups.tp,
        )
        place(embedding.weight, Placement("embedding.weight", **part))
        embedding.weight.tensor_model_parallel = True
        self._mark_shared(embedding.weight)
        return embedding

    def _head_weight(self) -> torch.nn.Parameter:
        """The head's weight: the embedding itself where both are on this stage and tied, else a parameter of its
        own."""
        tied = self.model_config.tie_embeddings
        if tied and self.pre_process:
            return self.embedding.weight
        self.head_weight = new_parameter(
            "embedding.weight" if tied else "head.weight",
            **self._vocabulary(),
            replica=int(tied),
            dtype=self.options.dtype,
            device=self.topology.device,
        )
        self.head_weight.tensor_model_parallel = True
        if tied:
            self.head_weight.shared = True  # the first stage's copy is the one counted in the gradient norm
        self._mark_shared(self.head_weight)
        return self.head_weight

    def _mark_shared(self, weight: torch.nn.Parameter) -> None:
        """A tied weight on two stages gets a bucket of its own, so that both stages split its optimizer state alike."""
        if self.model_config.tie_embeddings and self.topology.layout.pipeline > 1:
            weight.shared_embedding = True
