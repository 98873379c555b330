"""Conversion both ways: nothing lost, nothing changed, and transformers computes what we compute."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from moe_train.convert.huggingface import from_hf, to_hf
from moe_train.convert.names import counterparts
from moe_train.errors import DamagedError, UserError
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig
from tests import reference_jetmoe as reference
from tests.small_checkpoint import TEXT, random_weights, small_config, write_checkpoint, write_tokenizer

CONFIGS = {
    "tied": small_config(),
    "untied, top 3, gelu": small_config(
        tie_embeddings=False,
        vocab_size=37,
        hidden_size=21,
        attention=MixtureOfAttentionConfig(num_kv_heads=3, head_dim=6, num_experts=5, top_k=3),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=19, num_experts=5, top_k=3, activation="gelu"),
    ),
}


def hf_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A folder as transformers itself writes it."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    values = dict(
        vocab_size=41,
        hidden_size=16,
        num_hidden_layers=2,
        num_key_value_heads=3,
        kv_channels=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=10,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
    )
    JetMoeForCausalLM(JetMoeConfig(**{**values, **changes})).to(dtype).save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def altered(source, tmp_path):
    """``altered(change)``: the folder with its tensors or config changed by a function of both."""
    from safetensors.torch import save_file

    def make(change=lambda tensors, config: None) -> Path:
        tensors, config = tensors_of(source), json.loads((source / "config.json").read_text())
        change(tensors, config)
        folder = tmp_path / "altered"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


# --- what comes out


@pytest.mark.parametrize("shard_bytes", [None, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_computes_the_same(tmp_path, config, shard_bytes):
    from transformers import AutoModelForCausalLM

    weights = random_weights(config, seed=2)
    to_hf(write_checkpoint(tmp_path / "ours", config, weights), tmp_path / "hf", shard_bytes)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > (1 if shard_bytes else 0)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == bool(shard_bytes)
    assert ("lm_head.weight" in tensors_of(tmp_path / "hf")) == (not config.tie_embeddings)
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1, "some files are private"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
    ours = reference.forward({name: tensor.double() for name, tensor in weights.items()}, config, ids).logits
    assert theirs.abs().max() > 1
    torch.testing.assert_close(theirs.double(), ours, atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_out_and_in_again_changes_no_bit(tmp_path, config, dtype):
    from moe_train.checkpoint.weights import WeightsReader

    weights = random_weights(config, dtype)
    weights["final_norm.weight"][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    to_hf(write_checkpoint(tmp_path / "ours", config, weights), tmp_path / "hf", 30_000)
    from_hf(tmp_path / "hf", tmp_path / "again")
    reader = WeightsReader(tmp_path / "again")
    assert reader.config == config
    assert list(weights) == reader.names
    for name, tensor in weights.items():
        assert reader.dtype(name) == dtype and bits(reader.read(name)) == bits(tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_in_and_out_again_changes_no_bit(tmp_path, tied):
    source = hf_folder(tmp_path / "source", torch.bfloat16, tie_word_embeddings=tied)
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "again")
    before, after = tensors_of(source), tensors_of(tmp_path / "again")
    assert set(before) == set(after) and ("lm_head.weight" in before) == (not tied)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and bits(after[name]) == bits(tensor), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    assert {key: new.get(key) for key in old if key != "transformers_version"} == {
        key: value for key, value in old.items() if key != "transformers_version"
    }


def test_each_tensor_keeps_its_own_type(altered, tmp_path):
    def mix(tensors, config):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)

    from_hf(altered(mix), tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "again")
    after = tensors_of(tmp_path / "again")
    assert after.pop("model.norm.weight").dtype == torch.bfloat16
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


@pytest.mark.parametrize("sharded", [True, False])
def test_torchs_own_files_are_read(source, tmp_path, sharded):
    from moe_train.checkpoint.weights import WeightsReader

    tensors = tensors_of(source)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    if sharded:
        names = sorted(tensors)
        parts = {"pytorch_model-1.bin": names[:7], "pytorch_model-2.bin": names[7:]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    from_hf(folder, tmp_path / "ours")
    reader = WeightsReader(tmp_path / "ours")
    for pair in counterparts(reader.config):
        assert torch.equal(reader.read(pair.name), tensors[pair.hf_name].view(pair.shape)), pair.name


def test_the_exported_tokenizer_gives_the_same_ids(tmp_path, capsys):
    from transformers import AutoTokenizer

    from data_pipeline.tokenizer import load_tokenizer

    model = write_tokenizer(tmp_path)
    config = small_config()
    to_hf(write_checkpoint(tmp_path / "ours", config, random_weights(config), model), tmp_path / "hf")
    assert "note:" not in capsys.readouterr().out
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (
        "def main(x):",
        "  two  spaces ",
        "",
        " ",
        "a\n\n\tb",
        "schöne Grüße ☃ 漢字 12345",
        "\u00a0▁",
        "print" * 9,
    ):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert theirs.eos_token_id == ours.eos_id == generation["eos_token_id"] == 2
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 340},
        {"model_type": "char", "byte_fallback": False},
        {"model_type": "bpe", "user_defined_symbols": ["<sep>", "<sep>>", "\t"]},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=["unigram", "characters", "symbols of its own", "normalised"],
)
def test_tokenizers_of_every_kind_give_the_same_ids(tmp_path, options):
    import sentencepiece
    from transformers import AutoTokenizer

    from data_pipeline.tokenizer import load_tokenizer
    from moe_train.convert.hf_tokenizer import export_tokenizer

    plain = dict(vocab_size=320, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    lines = TEXT.splitlines() * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        hard_vocab_limit=False,
        minloglevel=2,
        **{**plain, **options},
    )
    (tmp_path / "hf").mkdir()
    _, remark = export_tokenizer(tmp_path / "tokenizer.model", tmp_path / "hf", 64)
    assert (remark is not None) == ("normalization_rule_name" in options)
    ours, theirs = load_tokenizer(tmp_path / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*lines[:5], "<sep>of<sep>>", " <sep> \t\n  two  spaces ", "", " ", "ﬁne ½ Ａ schöne ☃ 漢字 12"):
        assert theirs(text)["input_ids"] == ours.encode(text), text


def test_a_training_run_exports_its_weights(tmp_path):
    """A run's folder with moments and fp32 main parameters: the weights that it computes with come out."""
    from moe_train.checkpoint.config import CheckpointConfig
    from moe_train.checkpoint.save import Checkpointer
    from parallel import engine
    from tests import steps_on_ranks as steps

    config = steps.small_model()
    built = steps.build(steps.make_layout(1), config, precision="bf16")
    steps.run_steps(built, range(2), config.vocab_size)
    chunks, _, optimizer, _, topology = built
    state = {"step": 2, "samples": 16, "tokens": 240, "precision": "bf16"}
    Checkpointer(tmp_path / "checkpoints", CheckpointConfig(**{"async": False}), chunks, optimizer, topology).save(
        2, state
    )
    engine.stop()
    to_hf(tmp_path, tmp_path / "hf")
    exported = tensors_of(tmp_path / "hf")
    assert sum(tensor.numel() for tensor in exported.values()) == config.num_parameters()
    ours = {parameter.placement.name: parameter.detach() for parameter in chunks[0].parameters()}
    for pair in counterparts(config):
        assert bits(exported[pair.hf_name]) == bits(ours[pair.name]), pair.name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


# --- what is refused


def fails(call, *arguments, error=UserError) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    message = str(raised.value)
    assert "\n" not in message and raised.value.exit_code == {UserError: 2, DamagedError: 4}[error]
    return message


def _remove(name):
    return lambda tensors, config: tensors.pop(name)


def _add(name, tensor):
    return lambda tensors, config: tensors.update({name: tensor})


def _set(**values):
    return lambda tensors, config: config.update(values)


MISTAKES = {
    "missing tensor": (_remove("model.layers.1.mlp.bias"), "model.layers.1.mlp.bias is missing"),
    "unknown tensor": (
        _add("model.layers.0.mlp.extra", torch.zeros(2)),
        "model.layers.0.mlp.extra belongs to no part",
    ),
    "a layer too many": (
        _add("model.layers.2.mlp.bias", torch.zeros(16)),
        "model.layers.2.mlp.bias belongs to no part",
    ),
    "wrong shape": (_add("model.norm.weight", torch.zeros(15)), "model.norm.weight has the shape [15]"),
    "another head": (
        _add("lm_head.weight", torch.zeros(41, 16)),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "quantised": (
        _add("model.norm.weight", torch.zeros(16, dtype=torch.int8)),
        "model.norm.weight is torch.int8",
    ),
    "fewer layers": (_set(num_hidden_layers=1), "model.layers.1."),
    "not every expert": (_set(num_local_experts=2), "should have [2, 16]"),
    "heads": (
        _set(num_attention_heads=8),
        "num_attention_heads: 8 is not num_key_value_heads 3 x num_experts_per_tok 2",
    ),
    "other top_k": (_set(num_experts_per_tok=3), "num_attention_heads: 6 is not"),
    "contradiction": (_set(moe_num_experts=8), "moe_num_experts: 8 contradicts num_local_experts: 4"),
    "another model": (_set(model_type="gpt2"), "model_type: 'gpt2': what is converted is jetmoe, llama"),
    "scaled rope": (_set(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "rope type, by its old name": (
        _set(rope_parameters={"type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "rope_parameters",
    ),
    "rope type": (_set(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters"),
    "no bias": (_set(bias=False), "bias: false"),
    "no gate": (_set(glu=False), "glu: false"),
    "activation": (_set(activation_function="gelu_new"), "activation_function: 'gelu_new'"),
    "wrong type": (_set(hidden_size="16"), "hidden_size: '16'"),
    "top_k over experts": (_set(num_experts_per_tok=5, num_attention_heads=15), "num_experts_per_tok: 5"),
}


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_folder_that_is_not_this_model(altered, tmp_path, change, words):
    folder = altered(change)
    assert words in fails(from_hf, folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "something was left behind"


def test_a_tied_head_that_is_stored_all_the_same(altered, tmp_path):
    def copy(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    from_hf(altered(copy), tmp_path / "out")


def test_rotary_frequencies_of_old_files_are_passed_over(altered, source, tmp_path):
    def add(tensors, config):
        tensors["model.layers.1.self_attention.rotary_emb.inv_freq"] = torch.ones(2)

    from_hf(altered(add), tmp_path / "old")
    from_hf(source, tmp_path / "new")
    assert (tmp_path / "old" / "manifest.json").read_bytes() == (tmp_path / "new" / "manifest.json").read_bytes()


def test_the_authors_names(altered, source, tmp_path):
    """Names that transformers would swallow silently, and fall back to its defaults."""
    from moe_train.checkpoint.weights import WeightsReader

    def rename(tensors, config):
        for theirs, hf in (
            ("moe_num_experts", "num_local_experts"),
            ("moe_top_k", "num_experts_per_tok"),
            ("ffn_hidden_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"),
        ):
            config[theirs] = config.pop(hf)
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config.update(glu=True, bias=True, length=4096)

    from_hf(altered(rename), tmp_path / "theirs")
    from_hf(source, tmp_path / "hf")
    assert WeightsReader(tmp_path / "theirs").config == WeightsReader(tmp_path / "hf").config


def test_files_that_are_not_there_or_damaged(source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json: there is no such file" in fails(from_hf, empty, tmp_path / "out")
    (empty / "config.json").write_bytes((source / "config.json").read_bytes())
    assert "holds no weights" in fails(from_hf, empty, tmp_path / "out")
    (empty / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors: is not a safetensors file" in fails(from_hf, empty, tmp_path / "out", error=DamagedError)
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (empty / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors" in fails(from_hf, empty, tmp_path / "out")
    (empty / "config.json").write_text("{")
    assert "is not a JSON file" in fails(from_hf, empty, tmp_path / "out")


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "exists already" in fails(from_hf, source, tmp_path / "out")
    assert "exists already" in fails(to_hf, source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_the_target_may_be_a_link_and_not_the_folder_one_is_in(source, tmp_path, monkeypatch):
    for name, convert, given in (("ours", from_hf, source), ("hf", to_hf, tmp_path / "ours")):
        (tmp_path / f"{name}-elsewhere").mkdir()
        (tmp_path / name).symlink_to(f"{name}-elsewhere")
        convert(given, tmp_path / name)
        assert (tmp_path / name).is_symlink() and any((tmp_path / f"{name}-elsewhere").iterdir())
        (tmp_path / f"in-{name}").mkdir()
        monkeypatch.chdir(tmp_path / f"in-{name}")
        assert ". is in use" in fails(convert, given, ".")
        assert not list(tmp_path.glob("*.writing"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """Under a limit that the weights alone pass; safetensors' own error is none of the system's."""
    config = small_config(vocab_size=4096)
    write_checkpoint(tmp_path / "checkpoint", config, random_weights(config))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"1.partial: cannot be written \(.*File too large.*make room") as said:
            to_hf(tmp_path / "checkpoint", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(said.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_that_transformers_cannot_express(tmp_path):
    config = small_config(mlp=MixtureOfMLPConfig(ffn_hidden_size=22, num_experts=6, top_k=2))
    path = write_checkpoint(tmp_path / "ours", config, random_weights(config))
    assert "attention.num_experts 4 and mlp.num_experts 6 differ" in fails(to_hf, path, tmp_path / "out")


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    config = small_config()
    path = write_checkpoint(tmp_path / "ours", config, random_weights(config))
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shard.name in fails(to_hf, path, tmp_path / "out", error=DamagedError)
    assert not list(tmp_path.glob("out*"))
