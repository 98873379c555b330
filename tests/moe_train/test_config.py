"""Run files: what is read, what is refused, and that every complaint is one line that says where, what and
how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moe_train.config import RunConfig, load_run
from moe_train.config_file import all_presets, find_config, parse_override, preset_names
from moe_train.errors import UserError
from moe_train.training.config import BatchSizeWarmup, TrainingConfig
from moe_train.units import Duration
from parallel.errors import LayoutError

MODEL = "vocab_size: 64\nhidden_size: 16\nnum_layers: 2\nattention: {num_kv_heads: 2, head_dim: 8}\n"
MIXTURE = (
    "sequence_length: 32\nseed: 1\nsources: {a: {paths: [a.bin]}}\nphases: [{name: p, tokens: 100K, weights: {a: 1}}]\n"
)
RUN = "output_dir: out\nmodel: model.yaml\ndata:\n  mixture: ../data/mix.yaml\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with conf/run.yaml, conf/model.yaml and data/mix.yaml, and beside it the working folder."""
    for name, text in {"conf/run.yaml": RUN, "conf/model.yaml": MODEL, "data/mix.yaml": MIXTURE}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(Exception) as info:
        load_run(path, overrides)
    assert getattr(info.value, "exit_code", None) == 2, repr(info.value)
    assert "\n" not in str(info.value)
    return str(info.value)


def edited(folder: Path, old: str, new: str, name: str = "conf/run.yaml") -> Path:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder / "conf/run.yaml"


# --- what is read -------------------------------------------------------------------------------------------


def test_three_keys_are_enough(folder: Path) -> None:
    config = load_run(folder / "conf/run.yaml")
    assert config.output_dir == str(folder / "work/out")  # relative to where the command runs
    assert config.data.mixture == str(folder / "data/mix.yaml")  # relative to the file that names it
    assert config.model.hidden_size == 16 and config.model.mlp.num_experts == 8
    assert config.mixture.sequence_length == 32 and config.total_tokens == 100_000
    assert config.schedule.warmup == Duration(tokens=1000) and config.schedule.decay == Duration(tokens=20_000)
    assert config.layout(2).data == 2


def test_the_resolved_config_loads_to_an_equal_one(folder: Path) -> None:
    overrides = [
        "schedule.warmup=3 steps",
        "logging.wandb={}",
        "training.max_wall_time=1h30m",
        "optimizer.betas=[0.8, 0.99]",
    ]
    config = load_run(folder / "conf/run.yaml", overrides)
    resolved = folder / "work" / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_run(resolved) == config
    (folder / "elsewhere").mkdir()
    assert "async: true" in config.to_yaml() and "max_wall_time: 1h30m" in config.to_yaml()


def test_a_config_travels_as_json(folder: Path) -> None:
    """How a run gives it to its ranks."""
    overrides = ["training.max_wall_time=90s", "logging.wandb={}", "checkpoint.keep_every=3 steps"]
    config = load_run(folder / "conf/run.yaml", overrides)
    assert RunConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_every_preset_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    assert {"jetmoe_8b", "jetmoe_4b", "demo", "bench_60m"} <= set(preset_names("model"))
    for kind, path in all_presets():
        if kind == "run":
            load_run(path)


def test_the_reference_names_every_key() -> None:
    """configs/run/demo.yaml has each key of the schema (the model's are in its own file)."""
    path = find_config("demo", "run", Path("/"))
    written = yaml.safe_load(path.read_text())
    whole = yaml.safe_load(load_run(path).to_yaml())
    for section, keys in whole.items():
        if section not in ("output_dir", "model"):
            assert set(written[section]) == set(keys), section
    assert "#" in path.read_text()


def test_the_reference_tells_the_defaults() -> None:
    """A key of configs/run/demo.yaml whose value is not the schema's default has that default in its comment."""
    text = find_config("demo", "run", Path("/")).read_text()
    given = {"output_dir": "runs/demo", "model": {}, "data": {"mixture": "../data/demo.yaml"}}
    defaults = yaml.safe_load(RunConfig.model_validate(given).to_yaml()) | {"model": "../model/demo.yaml"}

    def leaves(node: yaml.MappingNode, default: dict) -> Iterator[tuple[str, object, object]]:
        for key, value in node.value:
            below = default[key.value]
            if isinstance(value, yaml.MappingNode) and isinstance(below, dict):
                yield from leaves(value, below)
            else:
                yield text.splitlines()[key.start_mark.line], yaml.safe_load(yaml.serialize(value)), below

    for line, value, default in leaves(yaml.compose(text), defaults):
        if value != default:
            told = re.search(r"(\S+) \(default\)|default ([^;:, ]+(?: steps)?)", line)
            assert told and yaml.safe_load(told[1] or told[2]) == default, (line, default)


def test_the_demo_divides_by_2_and_4() -> None:
    model = load_run("demo").model
    for number in (model.num_layers, model.attention.num_kv_heads, model.mlp.num_experts, model.vocab_size):
        assert number % 4 == 0


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "run/demo", "configs/run/demo.yaml"])
def test_a_preset_is_found_by_name_from_anywhere(name: str, folder: Path) -> None:
    assert load_run(name).output_dir == str(folder / "work/runs/demo")


def test_a_path_that_exists_wins_over_a_preset(folder: Path) -> None:
    (folder / "conf/jetmoe_8b").write_text(MODEL)
    run = edited(folder, "model.yaml", "jetmoe_8b")
    assert load_run(run).model.hidden_size == 16
    (folder / "conf/jetmoe_8b").unlink()
    assert load_run(run).model.hidden_size == 2048


def test_variables_are_put_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXES", str(folder / "data"))
    assert load_run(edited(folder, "../data", "${MIXES}")).data.mixture == str(folder / "data/mix.yaml")


def test_numbers_with_an_exponent(folder: Path) -> None:
    run = edited(folder, "output_dir: out\n", "output_dir: out\noptimizer: {lr: 5e-4, eps: 1E-9}\n")
    assert load_run(run).optimizer.lr == 5e-4


# --- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides_reach_into_sections_and_files(dashes: str, folder: Path) -> None:
    overrides = [
        "model.num_layers=4",
        "training.max_steps=1K",
        "data.validation=null",
        "checkpoint.async=false",
    ]
    config = load_run(folder / "conf/run.yaml", [dashes + text for text in overrides])
    assert (config.model.num_layers, config.training.max_steps) == (4, 1000)
    assert config.data.validation is None and config.checkpoint.async_save is False


def test_paths_of_overrides_are_relative_to_the_working_folder(folder: Path) -> None:
    (folder / "work/other.yaml").write_text(MODEL.replace("16", "32"))
    (folder / "work/mix.yaml").write_text(MIXTURE)
    config = load_run(folder / "conf/run.yaml", ["model=other.yaml", "model.num_layers=1", "data.mixture=mix.yaml"])
    assert (config.model.hidden_size, config.model.num_layers) == (32, 1)
    assert config.data.mixture == str(folder / "work/mix.yaml")
    assert load_run(folder / "conf/run.yaml", ["checkpoint.initialize_from=x/y"]).checkpoint.initialize_from == str(
        folder / "work/x/y"
    )


def test_a_replaced_section_need_not_exist(folder: Path) -> None:
    run = edited(folder, "model.yaml", "gone.yaml")
    assert load_run(run, ["model=jetmoe_4b"]).model.num_layers == 12


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.max_step=3",
            "override training.max_step=3: training.max_step: unknown key; did you mean 'max_steps'?",
        ),
        ("trainig.seed=3", "override trainig.seed=3: trainig: unknown key; did you mean 'training'?"),
        (
            "model.attention.topk=3",
            "override model.attention.topk=3: model.attention.topk: unknown key; did you mean 'top_k'?",
        ),
        (
            "optimizer.lr=fast",
            "override optimizer.lr=fast: optimizer.lr: 'fast' is not accepted; it should be a number",
        ),
        ("training.deterministic=on", "'on' is not true or false; write true or false"),
        (
            "faults.step_timeout=10",
            "10 is not a time; write a number with its unit, such as 30s, 10m, 1h or 1h30m",
        ),
        (
            "training.global_batch_size=9",
            "9 is not a multiple of micro_batch_size 4; the nearest that would do: 8",
        ),
        ("checkpoint.async_save=true", "unknown key; did you mean 'async'?"),
        ("seed", "not of the form a.b=c"),
        ("a..b=3", "not of the form a.b=c"),
        ("training.seed=", "has no value; write training.seed=null"),
        ("training.seed=[1", "override training.seed=[1: is not valid YAML"),
        ("output_dir.x=1", "output_dir is a value, not a section"),
    ],
)
def test_wrong_overrides(folder: Path, override: str, expected: str) -> None:
    assert expected in complaint(folder / "conf/run.yaml", override)


def test_parse_override_reads_yaml() -> None:
    keys, value = parse_override("--a.b={c: [1, 5e-4, true, '1']}")
    assert keys == ("a", "b") and value.data == {"c": [1, 5e-4, True, "1"]}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer: {lrr: 1}", "run.yaml:5: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("schedule:\n  warm_up: 3", "run.yaml:6: schedule.warm_up: unknown key; did you mean 'warmup'?"),
        (
            "training: {precision: fp16}",
            "run.yaml:5: training.precision: 'fp16' is not accepted; it should be 'fp32', 'bf16' or 'fp8'",
        ),
        (
            "training: {deterministic: yes}",
            "run.yaml:5: training.deterministic: 'yes' is not true or false; write true or false",
        ),
        ("training: {seed: 1.5}", "run.yaml:5: training.seed: 1.5 is not accepted; it should be an integer"),
        ("training: {seed: true}", "run.yaml:5: training.seed: true is not accepted"),
        ("optimizer: {lr: -1}", "run.yaml:5: optimizer.lr: -1"),
        ("optimizer: {lr: .nan}", "run.yaml:5: optimizer.lr: nan"),
        ("optimizer: {betas: [0.9, 1.0]}", "run.yaml:5: optimizer.betas: betas are two numbers"),
        ("checkpoint: {interval: 0}", "run.yaml:5: checkpoint.interval: must be more than 0"),
        (
            "checkpoint: {interval: often}",
            "run.yaml:5: checkpoint.interval: 'often' is not a duration; write tokens",
        ),
        (
            "schedule: {min_lr_ratio: 0}",
            "run.yaml:5: schedule.min_lr_ratio: an exponential decay never reaches 0",
        ),
        (
            "schedule: {warmup: 90K}",
            "run.yaml:5: schedule.warmup: warmup 90000 + decay 20000 tokens are more than",
        ),
        ("training: {batch_size_warmup: {start: 3, tokens: 1K}}", "the nearest that would do: 4"),
        ("output_dir: twice", "run.yaml:5: output_dir: the key comes twice (first in line 1)"),
        (
            "logging: ${NOT_SET_ANYWHERE}",
            "run.yaml:5: logging: the environment variable NOT_SET_ANYWHERE is not set",
        ),
        ("logging: [1]", "run.yaml:5: logging: "),
        ("optimizer: adam.yaml", "run.yaml:5: optimizer: there is no file "),
    ],
)
def test_refused_lines(folder: Path, line: str, expected: str) -> None:
    assert expected in complaint(_append(folder, line))


def _append(folder: Path, line: str) -> Path:
    path = folder / "conf/run.yaml"
    path.write_text(path.read_text() + line + "\n")
    return path


def test_a_missing_key(folder: Path) -> None:
    assert "run.yaml:1: output_dir: is missing; add it" in complaint(edited(folder, "output_dir: out\n", ""))


def test_a_mistake_in_a_sections_own_file_names_that_file(folder: Path) -> None:
    text = complaint(edited(folder, "num_layers: 2", "num_layers: two", "conf/model.yaml"))
    assert text.startswith(f"{folder}/conf/model.yaml:3: model.num_layers: 'two' is not accepted")


def test_a_mistake_in_the_mixture_names_that_file(folder: Path) -> None:
    text = complaint(edited(folder, "weights: {a: 1}", "weights: {b: 1}", "data/mix.yaml"))
    assert text.startswith(f"{folder}/data/mix.yaml:4: phases[0].weights.b: unknown source")


def test_sequences_longer_than_the_model_takes(folder: Path) -> None:
    text = complaint(folder / "conf/run.yaml", "model.max_sequence_length=16")
    assert "model.max_sequence_length: 16 is less than the mixture's sequence_length 32" in text


def test_a_mixture_of_less_than_a_step(folder: Path) -> None:
    text = complaint(folder / "conf/run.yaml", "training.global_batch_size=4096")
    assert "run.yaml:4: data.mixture: its 100000 tokens are less than the 131072 of one step (4096 sequences" in text
    assert f"give the phases in {folder}/data/mix.yaml more, or make training.global_batch_size smaller" in text
    load_run(folder / "conf/run.yaml", ["training.global_batch_size=3124"])  # 99968: one step, and no more
    warm = "training.batch_size_warmup={start: 4, tokens: 1K}"
    load_run(folder / "conf/run.yaml", ["training.global_batch_size=4096", warm])


def test_missing_files(folder: Path) -> None:
    assert "there is no file nowhere.yaml" in complaint(Path("nowhere.yaml"))
    assert "is a folder; name the YAML file in it" in complaint(folder / "conf")
    assert "model: there is no file jetmoe_9b; did you mean 'jetmoe_8b'?" in complaint(
        folder / "conf/run.yaml", "model=jetmoe_9b"
    )
    assert "run.yaml:4: data.mixture: there is no file" in complaint(edited(folder, "mix.yaml", "gone.yaml"))


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_not_a_run_file(folder: Path, text: str) -> None:
    (folder / "conf/run.yaml").write_text(text)
    assert "run.yaml:1: is not a run file" in complaint(folder / "conf/run.yaml")


# --- what the parts say together ----------------------------------------------------------------------------


def test_layout_checks_the_first_batches_too(folder: Path) -> None:
    config = load_run(folder / "conf/run.yaml", ["training.batch_size_warmup={start: 4, tokens: 10K}"])
    assert config.layout(1).data == 1
    with pytest.raises(LayoutError, match="global_batch_size 4 is not a multiple"):
        config.layout(2)


def test_batch_size_warmup_grows_in_multiples_of_its_start(folder: Path) -> None:
    training = load_run(folder / "conf/run.yaml", ["training.batch_size_warmup={start: 4, tokens: 1000}"]).training
    sizes = [training.batch_size(tokens) for tokens in range(0, 1500, 10)]
    assert sizes[0] == 4 and sizes[-1] == 16 and set(sizes) == {4, 8, 12, 16} and sizes == sorted(sizes)
    assert training.batch_size(999) == 12 and training.batch_size(1000) == 16


@pytest.mark.parametrize("limit", [None, 1, 6, 7, 40])
@pytest.mark.parametrize("warmup", [None, BatchSizeWarmup(start=2, tokens=400), BatchSizeWarmup(start=2, tokens=10**6)])
@pytest.mark.parametrize("num_samples", [0, 1, 9, 160, 163])
def test_where_a_run_ends_is_where_its_steps_lead(limit, warmup, num_samples) -> None:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=8, batch_size_warmup=warmup, max_steps=limit)
    way = [(0, 0)]
    while (step := way[-1][0]) != limit:
        samples = way[-1][1] + training.batch_size(way[-1][1] * 16)
        if samples > num_samples:
            break
        way.append((step + 1, samples))
    for step, samples in way:
        assert training.end(num_samples, 16, step, samples) == way[-1]
    assert training.end(num_samples, 16) == way[-1]


def test_the_config_of_an_earlier_start_loads_without_its_mixture(folder: Path) -> None:
    (folder / "data/mix.yaml").write_text("nonsense")
    assert isinstance(load_run(folder / "conf/run.yaml", with_mixture=False), RunConfig)


def test_user_errors_carry_their_status() -> None:
    assert UserError.exit_code == 2 and LayoutError.exit_code == 2
