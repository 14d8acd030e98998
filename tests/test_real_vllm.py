"""A real vLLM engine on this machine's CPU: exact lengths, KV that moves, weights that change. float32 and greedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simrl.real_backend import engine as engine_module
from simrl.real_backend.engine import EngineSettings, Finished, StepReport, VllmEngine, Work
from simrl.real_backend.tiny_model import write_tiny_model

BLOCK = 32
BUDGET = 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(write_tiny_model(tmp_path_factory.mktemp(f"model{seed}"), seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def kv_folder() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder) / "kv"


@pytest.fixture(scope="module")
def engines(models: list[str], kv_folder: Path) -> Iterator[tuple[VllmEngine, VllmEngine]]:
    settings = EngineSettings(
        model=models[0], num_kv_blocks=97, max_model_len=512, max_num_batched_tokens=BUDGET, kv_folder=str(kv_folder)
    )
    pair = VllmEngine(settings), VllmEngine(settings)
    yield pair
    for engine in pair:
        engine.close()


@pytest.fixture
def pair(engines: tuple[VllmEngine, VllmEngine], models: list[str], kv_folder: Path) -> tuple[VllmEngine, VllmEngine]:
    """Two engines with the first weights, no work and no KV."""
    for engine in engines:
        engine.take_out(engine.unfinished(), with_kv=False)
        if engine.weights_version:
            engine.load_weights(models[0], 0)
        engine.forget_prefixes()
    for folder in kv_folder.glob("*"):
        shutil.rmtree(folder)
    return engines


def prompt(tokens: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng((tokens, seed)).integers(3, 4096, tokens).tolist()
    return drawn


def work(lengths: Sequence[int], prompt_tokens: Sequence[int], **rest: Any) -> list[Work]:
    return [
        Work(response_id=10 + i, prompt_token_ids=prompt(p, i), forced_tokens=tokens, **rest)
        for i, (tokens, p) in enumerate(zip(lengths, prompt_tokens, strict=True))
    ]


def run(engine: VllmEngine, works: Sequence[Work]) -> tuple[dict[int, Finished], list[StepReport]]:
    for each in works:
        engine.add(each)
    reports = []
    while engine.unfinished():
        reports.append(engine.step())
    return {done.response_id: done for report in reports for done in report.finished}, reports


def tokens_of(finished: dict[int, Finished]) -> dict[int, tuple[int, ...]]:
    return {response_id: done.token_ids for response_id, done in finished.items()}


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


class Reference:
    """The same model in transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def log_probs(self, token_ids: Sequence[int], prompt_tokens: int) -> list[float]:
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([list(token_ids)])).logits[0]
        log_probs = torch.log_softmax(logits, -1)
        return [log_probs[i - 1, token_ids[i]].item() for i in range(prompt_tokens, len(token_ids))]

    def is_greedy(self, prompt_token_ids: Sequence[int], response: Sequence[int]) -> bool:
        """Each token of the response is the likeliest after all before it."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt_token_ids, *response]])).logits[0]
        return bool(logits.argmax(-1)[len(prompt_token_ids) - 1 : -1].tolist() == list(response))


# --- Lengths and iterations. ---


def test_lengths_are_forced_and_every_iteration_is_reported(pair: tuple[VllmEngine, VllmEngine]) -> None:
    lengths, prompts = (5, 12, 40, 41), (33, 40, 17, 96)
    finished, reports = run(pair[0], work(lengths, prompts))
    assert [len(finished[10 + i].token_ids) for i in range(4)] == list(lengths)
    assert len(reports) == max(lengths)
    assert [report.prefill_tokens for report in reports] == [sum(prompts)] + [0] * 40
    assert [report.batch for report in reports] == [0] + [4] * 4 + [3] * 7 + [2] * 28 + [1]
    assert reports[1].context_tokens == sum(prompts) + 4  # the first token of each is known
    assert reports[40].context_tokens == 96 + 40
    assert [done.response_id for done in reports[11].finished] == [11]
    assert sum(len(ids) for report in reports for ids in report.new_tokens.values()) == sum(lengths)
    assert [finished[10 + i].computed_tokens for i in range(4)] == list(prompts)
    assert all(0 < report.seconds < 10 for report in reports)
    for done in finished.values():
        assert len(set(done.token_ids)) > 0.8 * len(done.token_ids)  # or comparing tokens would prove little


def test_warming_the_caches_changes_nothing(pair: tuple[VllmEngine, VllmEngine]) -> None:
    works = work((5, 12, 40, 41, 3), (33, 40, 17, 300, 20))  # one prompt is computed in chunks
    expected, plain = run(pair[1], works)
    got: dict[int, Finished] = {}
    reports: list[StepReport] = []
    for each in works:
        pair[0].add(each)
    pair[0].warm_caches()
    while pair[0].unfinished():
        reports.append(pair[0].step())
        got |= {done.response_id: done for done in reports[-1].finished}
        used = pair[0].kv_used()
        pair[0].warm_caches()
        assert pair[0].kv_used() == used
    assert got == expected  # log-probs, cached and computed tokens included
    assert [(r.batch, r.prefill_tokens) for r in reports] == [(r.batch, r.prefill_tokens) for r in plain]


def test_those_beyond_the_slots_wait(pair: tuple[VllmEngine, VllmEngine]) -> None:
    finished, reports = run(pair[0], work([10] * 40, [6] * 40))
    assert len(finished) == 40
    assert len(reports) == 20
    assert (reports[0].num_running, reports[0].num_waiting) == (32, 8)
    assert (reports[10].num_running, reports[10].num_waiting) == (8, 0)


def test_preempted_responses_end_the_same(pair: tuple[VllmEngine, VllmEngine]) -> None:
    works = work([90] * 32, [40] * 32)
    expected: dict[int, tuple[int, ...]] = {}
    for start in range(0, 32, 16):
        expected |= tokens_of(run(pair[1], works[start : start + 16])[0])
    before = pair[0].num_preemptions
    for each in works:
        pair[0].add(each)
    used, preempted = 0.0, 0
    got: dict[int, Finished] = {}
    while pair[0].unfinished():
        report = pair[0].step()
        used = max(used, pair[0].kv_used())
        preempted += report.num_preempted
        assert len(pair[0].running()) == report.num_running
        got |= {done.response_id: done for done in report.finished}
    assert tokens_of(got) == expected
    assert preempted == pair[0].num_preemptions - before > 0
    assert 0.95 < used <= 1
    assert sum(done.computed_tokens for done in got.values()) > 32 * 40  # what was preempted is computed again
    assert pair[0].kv_used() == 0


def test_stop_ids_and_cap_end_what_is_not_forced(pair: tuple[VllmEngine, VllmEngine]) -> None:
    forced = run(pair[0], work([30], [20]))[0][10].token_ids
    stop = forced[11]
    assert stop not in forced[:11]
    for cap, expected in ((30, forced[:12]), (8, forced[:8])):
        open_ended = Work(response_id=1, prompt_token_ids=prompt(20), max_tokens=cap, stop_token_ids=(stop,))
        assert run(pair[0], [open_ended])[0][1].token_ids == expected
    assert run(pair[0], work([30], [20], stop_token_ids=(stop,)))[0][10].token_ids == forced


def test_each_response_samples_by_its_own_seed(pair: tuple[VllmEngine, VllmEngine]) -> None:
    same = prompt(20)
    works = [
        Work(response_id=i, prompt_token_ids=same, forced_tokens=12, temperature=1.5, seed=seed, log_probs=True)
        for i, seed in enumerate((5, 6, 5))
    ]
    finished, _ = run(pair[0], works)
    assert finished[0].token_ids == finished[2].token_ids != finished[1].token_ids
    for done in finished.values():
        assert done.log_probs == pytest.approx(pair[0].log_probs([*same, *done.token_ids], 20), abs=1e-3)
    later = Work(response_id=1, prompt_token_ids=same, generated_token_ids=[7], max_tokens=3, temperature=1.0, seed=5)
    assert engine_module._sampling(later).seed not in (5, None)


def test_impossible_work_is_refused(pair: tuple[VllmEngine, VllmEngine]) -> None:
    with pytest.raises(ValueError, match="one of forced_tokens and max_tokens"):
        Work(response_id=1, prompt_token_ids=[5])
    with pytest.raises(ValueError, match="has all its 2 tokens"):
        Work(response_id=1, prompt_token_ids=[5], generated_token_ids=[6, 7], forced_tokens=2)
    with pytest.raises(ValueError, match="max_model_len=512"):
        pair[0].add(Work(response_id=1, prompt_token_ids=[5] * 500, forced_tokens=13))
    pair[0].add(Work(response_id=1, prompt_token_ids=[5], forced_tokens=2))
    with pytest.raises(ValueError, match="response 1 is on this engine"):
        pair[0].add(Work(response_id=1, prompt_token_ids=[5], forced_tokens=2))
    for needs_idle in (lambda: pair[0].prefill([[5]]), lambda: pair[0].log_probs([5, 6], 1), pair[0].park):
        with pytest.raises(RuntimeError, match="still has 1 responses"):
            needs_idle()
    with pytest.raises(RuntimeError, match="not parked"):
        pair[0].wake()
    with pytest.raises(ValueError, match="multiple of 32"):
        EngineSettings(model="m", num_kv_blocks=8, block_tokens=16)
    with pytest.raises(ValueError, match="num_kv_blocks and kv_bytes"):
        EngineSettings(model="m")


# --- KV that moves. ---

PROMPTS = (33, 64, 65, 100, 31)


def test_prompts_prefilled_elsewhere_are_loaded_not_computed(
    pair: tuple[VllmEngine, VllmEngine], kv_folder: Path
) -> None:
    works = work([30 + i for i in range(10)], [p for p in PROMPTS for _ in range(2)])
    twins = [
        Work(response_id=each.response_id, prompt_token_ids=works[i // 2 * 2].prompt_token_ids, forced_tokens=30 + i)
        for i, each in enumerate(works)
    ]
    expected, _ = run(pair[1], twins)
    pair[1].forget_prefixes()

    prefilled = pair[0].prefill([twins[2 * i].prompt_token_ids for i in range(len(PROMPTS))])
    assert prefilled.computed_tokens == sum(PROMPTS)
    files = list((kv_folder / "v0").iterdir())
    assert len(files) == prefilled.kv_saved.num_blocks == sum(p // BLOCK for p in PROMPTS)
    assert sum(file.stat().st_size for file in files) == prefilled.kv_saved.num_bytes
    assert prefilled.kv_saved.num_bytes == len(files) * 2 * 4 * BLOCK * 2 * 64 * 4  # K, V; layers; tokens; heads; float
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert [folder.stat().st_mode & 0o777 for folder in (kv_folder, kv_folder / "v0")] == [0o700, 0o700]

    got, reports = run(pair[1], twins)
    assert tokens_of(got) == tokens_of(expected)
    cached = [whole_blocks(p - 1) for p in PROMPTS for _ in range(2)]
    assert [got[10 + i].cached_tokens for i in range(10)] == cached
    loaded = reports[0].kv_loaded
    assert loaded is not None
    assert loaded.num_blocks == sum(whole_blocks(p - 1) for p in PROMPTS) // BLOCK  # the twin finds them loaded
    assert loaded.num_bytes == loaded.num_blocks * files[0].stat().st_size
    assert loaded.seconds > 0
    assert sum(report.prefill_tokens for report in reports) == sum(
        p - whole_blocks(p - 1) for p in PROMPTS for _ in range(2) if p % BLOCK != 1
    )


@pytest.mark.parametrize("with_kv", [True, False])
def test_moved_responses_continue_token_by_token(pair: tuple[VllmEngine, VllmEngine], with_kv: bool) -> None:
    works = work([50 + i for i in range(20)], [20 + 3 * i for i in range(20)], log_probs=True)
    expected, _ = run(pair[0], works)
    pair[0].forget_prefixes()
    for each in works:
        pair[0].add(each)
    for _ in range(41):
        pair[0].step()
    moved = pair[0].take_out([each.response_id for each in works], with_kv)
    assert pair[0].unfinished() == ()
    assert pair[0].kv_used() == 0
    generated = [len(each.work.generated_token_ids) for each in moved]
    assert all(35 <= tokens <= 41 for tokens in generated)  # the prompts took a few iterations
    known = [20 + 3 * i + tokens for i, tokens in enumerate(generated)]
    kept = [whole_blocks(tokens - 1) if with_kv else 0 for tokens in known]
    assert [each.kv_tokens for each in moved] == kept
    assert sum(each.kv_saved.num_blocks for each in moved if each.kv_saved) == sum(kept) // BLOCK

    got, reports = run(pair[1], [each.work for each in moved])
    assert tokens_of(got) == tokens_of(expected)
    assert [got[10 + i].cached_tokens for i in range(20)] == kept
    assert sum(report.kv_loaded.num_blocks for report in reports if report.kv_loaded) == sum(kept) // BLOCK
    for response_id, done in got.items():
        assert done.log_probs == pytest.approx(expected[response_id].log_probs, abs=1e-3)


def test_responses_move_in_the_middle_of_prefill_or_before_it(pair: tuple[VllmEngine, VllmEngine]) -> None:
    works = work([20, 20], [300, 40])
    expected, _ = run(pair[0], works)
    pair[0].forget_prefixes()
    for each in works:
        pair[0].add(each)
    assert pair[0].step().prefill_tokens == BUDGET
    moved = pair[0].take_out([10, 11], with_kv=True)
    assert [each.kv_tokens for each in moved] == [BUDGET, 0]
    got, _ = run(pair[1], [each.work for each in moved])
    assert tokens_of(got) == tokens_of(expected)
    assert [got[i].cached_tokens for i in (10, 11)] == [BUDGET, 0]


def test_blocks_after_those_cached_here_are_loaded(pair: tuple[VllmEngine, VllmEngine]) -> None:
    (long,) = work([20], [130])
    short = Work(response_id=1, prompt_token_ids=long.prompt_token_ids[:70], forced_tokens=1)
    expected, _ = run(pair[0], [long])
    pair[0].prefill([long.prompt_token_ids])
    run(pair[1], [short])
    got, reports = run(pair[1], [long])
    assert tokens_of(got) == tokens_of(expected)
    assert got[10].cached_tokens == 128
    assert reports[0].kv_loaded is not None
    assert reports[0].kv_loaded.num_blocks == 2


def test_blocks_that_cannot_be_read_are_computed(
    pair: tuple[VllmEngine, VllmEngine], kv_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simrl.real_backend import kv_connector

    works = work([20] * 3, [100, 80, 70])
    expected, _ = run(pair[1], works)
    pair[1].forget_prefixes()
    pair[0].prefill([each.prompt_token_ids for each in works])
    lost = sorted(file.name for file in (kv_folder / "v0").iterdir())[::2]

    def read(path: Path) -> bytes:
        if path.name in lost:
            path.unlink(missing_ok=True)
        return read_file(path)

    read_file = kv_connector._read
    monkeypatch.setattr(kv_connector, "_read", read)
    got, reports = run(pair[1], works)
    assert tokens_of(got) == tokens_of(expected)
    loaded = reports[0].kv_loaded
    assert loaded is not None
    assert loaded.num_blocks == 7 - len(lost)


def test_kv_that_no_worker_loads_is_noticed(
    pair: tuple[VllmEngine, VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simrl.real_backend import kv_connector

    works = work([20], [100])
    pair[0].prefill([works[0].prompt_token_ids])
    monkeypatch.setattr(kv_connector.FileConnector, "start_load_kv", lambda self, context: None)
    pair[1].add(works[0])
    with pytest.raises(RuntimeError, match="no worker loaded the 3 KV blocks"):
        pair[1].step()


def test_a_block_is_named_by_all_tokens_before_its_end() -> None:
    from simrl.real_backend.kv_connector import block_names

    tokens = prompt(100)
    names = block_names(tokens, BLOCK)
    assert len(set(names)) == len(names) == 3
    assert block_names(tokens[:64], BLOCK) == names[:2]
    changed = block_names([*tokens[:40], tokens[40] + 1, *tokens[41:]], BLOCK)
    assert changed[0] == names[0]
    assert not set(changed[1:]) & set(names)
    assert not set(block_names(tokens, 64)) & set(names)


def test_kv_caches_of_another_layout_are_refused() -> None:
    import torch

    from simrl.real_backend.kv_connector import _kv_caches

    layers = {"b": SimpleNamespace(kv_cache=torch.ones(4, 2)), "a": SimpleNamespace(kv_cache=torch.zeros(4, 2))}
    assert [cache.sum().item() for cache in _kv_caches({**layers, "experts": SimpleNamespace()}, 4)] == [0, 8]
    with pytest.raises(ValueError, match="expected KV caches of 2 blocks"):  # half as many, twice as long
        _kv_caches(layers, 2)
    with pytest.raises(ValueError, match=r"got shapes \[\]"):
        _kv_caches({}, 2)


def test_ranks_move_their_shares_of_the_same_blocks() -> None:
    from simrl.real_backend.kv_connector import KVMove, Loaded

    assert Loaded(KVMove(3, 100, 0.2)).aggregate(Loaded(KVMove(3, 110, 0.1))) == Loaded(KVMove(3, 210, 0.2))
    assert KVMove(3, 100, 0.25) + KVMove(2, 10, 0.5) == KVMove(5, 110, 0.75)


# --- Weights that change. ---


def test_new_weights_are_used_throughout(pair: tuple[VllmEngine, VllmEngine], models: list[str]) -> None:
    works = work([40] * 3, [20, 50, 70])
    old, _ = run(pair[0], works)
    assert pair[0].load_weights(models[1], 1) > 0
    assert pair[0].weights_version == 1
    new, _ = run(pair[0], works)
    reference = Reference(models[1])
    for each in works:
        response = new[each.response_id].token_ids
        assert response != old[each.response_id].token_ids
        assert reference.is_greedy(each.prompt_token_ids, response)
        sequence = [*each.prompt_token_ids, *response]
        prompt_tokens = len(each.prompt_token_ids)
        assert pair[0].log_probs(sequence, prompt_tokens) == pytest.approx(
            reference.log_probs(sequence, prompt_tokens), abs=1e-3
        )


def test_a_stale_output_head_would_be_seen(
    pair: tuple[VllmEngine, VllmEngine], models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "repack_cpu_gemms", lambda model: None)
    pair[0].load_weights(models[1], 1)
    sequence = prompt(40)
    got, expected = pair[0].log_probs(sequence, 10), Reference(models[1]).log_probs(sequence, 10)
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) > 1


def test_weights_may_change_under_running_responses(pair: tuple[VllmEngine, VllmEngine], models: list[str]) -> None:
    (each,) = work([40], [50])
    pair[0].add(each)
    for _ in range(15):
        pair[0].step()
    pair[0].load_weights(Path(models[1]) / "model.safetensors", 3)
    response = run(pair[0], [])[0][10].token_ids
    assert Reference(models[0]).is_greedy(each.prompt_token_ids, response[:15])
    assert Reference(models[1]).is_greedy([*each.prompt_token_ids, *response[:15]], response[15:])


def test_kv_of_other_weights_is_never_hit(
    pair: tuple[VllmEngine, VllmEngine], models: list[str], kv_folder: Path
) -> None:
    works = work([20] * 2, [70, 100])
    pair[0].prefill([each.prompt_token_ids for each in works])
    run(pair[1], works)
    pair[1].load_weights(models[1], 1)
    got, reports = run(pair[1], works)
    assert [done.cached_tokens for done in got.values()] == [0, 0]
    assert not any(report.kv_loaded.num_blocks for report in reports if report.kv_loaded)
    reference = Reference(models[1])
    assert all(reference.is_greedy(each.prompt_token_ids, got[each.response_id].token_ids) for each in works)

    pair[0].load_weights(models[1], 1)
    pair[0].prefill([each.prompt_token_ids for each in works])
    assert sorted(folder.name for folder in kv_folder.iterdir()) == ["v0", "v1"]
    pair[1].forget_kv(0)
    assert [folder.name for folder in kv_folder.iterdir()] == ["v1"]
    pair[1].forget_prefixes()
    got, _ = run(pair[1], works)
    assert [got[i].cached_tokens for i in (10, 11)] == [64, 96]
    assert all(reference.is_greedy(each.prompt_token_ids, got[each.response_id].token_ids) for each in works)


def test_weights_that_lack_a_part_are_refused(
    pair: tuple[VllmEngine, VllmEngine], models: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(models[1]) / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model, model\.norm\.weight"):
        pair[0].load_weights(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        pair[0].load_weights(tmp_path / "elsewhere", 1)
    assert pair[0].weights_version == 0


# --- The life of a process with engines. ---

LIFE = """
import dataclasses, json, os, sys, psutil
from simrl.real_backend.engine import EngineSettings, VllmEngine, Work

def resident(): return psutil.Process().memory_info().rss

def generate(engine):
    engine.add(Work(response_id=1, prompt_token_ids=list(range(5, 75)), forced_tokens=20))
    while engine.unfinished():
        report = engine.step()
    return report.finished[0]

settings = EngineSettings(model=sys.argv[1], num_kv_blocks=2048, max_model_len=512, kv_folder=sys.argv[2])
engine = VllmEngine(settings)
warm_up_s = engine.warm_up()
first = generate(engine)
engine.forget_kv(0)
for cache in engine._engine.engine_core.engine_core.model_executor.driver_worker.model_runner.kv_caches:
    cache.fill_(1)  # so that the memory is really there
full = resident()
park_s = engine.park()
parked = resident()
try:
    engine.add(Work(response_id=1, prompt_token_ids=[5], forced_tokens=2))
except RuntimeError as error:
    refused = str(error)
wake_s = engine.wake()
second = generate(engine)
listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
engine.close()
engine = VllmEngine(dataclasses.replace(settings, kv_folder=None))
try:
    engine.prefill([[5, 6]])
except RuntimeError as error:
    refused += f"{error}, {len(engine.unfinished())} left"
third = generate(engine)
engine.close()
print(json.dumps(dict(
    tokens=first.token_ids, same=first.token_ids == second.token_ids == third.token_ids,
    cached=[done.cached_tokens for done in (first, second, third)], kv_bytes=2048 * 131072,
    freed=full - parked, refused=refused, phases=engine.cold_start_phases,
    times=[warm_up_s, park_s, wake_s], listening=listening,
    children=len(psutil.Process().children()),
)))
"""


def test_an_engine_loads_kv_of_another_process_parks_wakes_and_leaves_nothing(
    models: list[str], pair: tuple[VllmEngine, VllmEngine], kv_folder: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    each = Work(response_id=1, prompt_token_ids=list(range(5, 75)), forced_tokens=20)
    expected = run(pair[0], [each])[0][1].token_ids
    pair[0].prefill([each.prompt_token_ids])
    done = subprocess.run(
        [sys.executable, "-c", LIFE, models[0], str(kv_folder)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    life = json.loads(done.stdout.splitlines()[-1])
    assert life["tokens"] == list(expected)
    assert life["same"]
    assert life["cached"] == [64, 0, 0]
    assert life["freed"] > 0.9 * life["kv_bytes"]
    assert "parked" in life["refused"]
    assert "no kv_folder to leave KV in, 0 left" in life["refused"]
    assert set(life["phases"]) == {"import_s", "load_s", "init_s"}
    assert all(0 <= seconds < 120 for seconds in [*life["phases"].values(), *life["times"]])
    assert set(life["listening"]) <= {"127.0.0.1", "::1"}
    assert life["children"] == 0
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert list(kv_folder.iterdir()) == []
