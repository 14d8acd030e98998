"""The real learner: FSDP2 ranks in processes of their own, on the CPU, over the loopback interface."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simrl.real_backend.batch import TrainingBatch
from simrl.real_backend.rewards import ResidueTask

WAIT_S = 60.0
VOCABULARY = 256
Weights = dict[str, np.ndarray]


# --- Processes that each hold one rank; they outlive a learner, since importing torch is the slow part. ---


def serve(pipe: Connection) -> None:
    """Do what comes through the pipe until it closes: a function of this process's `state` and arguments."""
    state: dict[str, Any] = {}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(state, *arguments)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class RankFailed(Exception):
    """What a rank raised: its type's name and its message."""


class Ranks:
    """Two processes, of which a learner uses the first one or both."""

    def __init__(self) -> None:
        self.pipes: list[Any] = [None, None]
        self.processes: list[Any] = [None, None]
        for rank in range(2):
            self.start(rank)

    def start(self, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes[rank], theirs = context.Pipe()
        self.processes[rank] = context.Process(target=serve, args=(theirs,), daemon=True)
        self.processes[rank].start()
        theirs.close()

    def restart(self) -> None:
        for rank in range(2):
            self.stop(rank)
            self.start(rank)

    def stop(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join(5)
        self.pipes[rank].close()

    def send(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.pipes[rank].send((function, arguments))

    def result(self, rank: int) -> Any:
        if not self.pipes[rank].poll(WAIT_S):
            raise TimeoutError(f"rank {rank} said nothing for {WAIT_S} s")
        done, result = self.pipes[rank].recv()
        if not done:
            raise RankFailed(*result)
        return result

    def all(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of one function on the first *world* ranks."""
        for rank in range(world):
            self.send(rank, function, *arguments)
        results, failures = [], []
        for rank in range(world):
            try:
                results.append(self.result(rank))
            except RankFailed as failure:  # the other ranks' results are not to be taken for those of a later call
                failures.append(failure)
        if failures:
            raise failures[0]
        return results


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    for rank in range(2):
        pool.stop(rank)


def write_model(folder: Path, vocabulary: int, layers: int) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=vocabulary, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), vocabulary=VOCABULARY, layers=2)


# --- What the ranks do ---


def make(state: dict[str, Any], settings: Any) -> None:
    from simrl.real_backend.learner import LearnerRank

    state["learner"] = LearnerRank(settings)


def close(state: dict[str, Any]) -> None:
    state.pop("learner").close()


def call(state: dict[str, Any], method: str, *arguments: Any) -> Any:
    return getattr(state["learner"], method)(*arguments)


def weights_of(state: dict[str, Any]) -> Weights:
    return {name: tensor.numpy().copy() for name, tensor in state["learner"].full_parameters()}


def random_number(state: dict[str, Any]) -> float:
    import torch

    return float(torch.rand(()))


def listening_addresses(state: dict[str, Any]) -> list[str]:
    """Hexadecimal addresses at which this process listens for TCP."""
    mine = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own descriptor is closed by now
            mine.add(os.readlink(entry.path).removeprefix("socket:[").removesuffix("]"))
    rows = []
    for table in ("tcp", "tcp6"):
        rows += [line.split() for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in mine]


class Learner:
    """A learner of some ranks, as the process that drives it sees it."""

    def __init__(self, ranks: Ranks, world: int, model: str, rendezvous: Path, **settings: Any) -> None:
        from simrl.real_backend.learner_settings import LearnerSettings

        self.ranks, self.world = ranks, world
        common: dict[str, Any] = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "timeout_s": 20.0}
        self.settings = LearnerSettings(model, 0, world, f"file://{rendezvous}", **(common | settings))
        for rank in range(world):
            ranks.send(rank, make, replace(self.settings, rank=rank))
        for rank in range(world):
            ranks.result(rank)

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *error: object) -> None:
        self.ranks.all(self.world, close)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        return self.ranks.all(self.world, call, method, *arguments)

    def fails(self, match: str, method: str, *arguments: Any) -> None:
        """The method raises on every rank."""
        for rank in range(self.world):
            self.ranks.send(rank, call, method, *arguments)
        for rank in range(self.world):
            with pytest.raises(RankFailed, match=match):
                self.ranks.result(rank)

    def prepared(self, batch: TrainingBatch, critic: bool = False) -> TrainingBatch:
        batch = batch.with_scores(self.all("log_probs", batch))
        return batch.with_scores(self.all("values", batch)) if critic else batch

    def weights(self) -> Weights:
        first, *others = self.ranks.all(self.world, weights_of)
        for other in others:
            assert distance(first, other) == 0.0
        return first


Make = Callable[..., Learner]


@pytest.fixture
def learner(ranks: Ranks, model: str, tmp_path: Path) -> Make:
    numbers = iter(range(100))

    def made(world: int, **settings: Any) -> Learner:
        return Learner(ranks, world, model, tmp_path / f"rendezvous{next(numbers)}", **settings)

    return made


def batch_of(seed: int, responses: int = 10, group: int = 2, longest: int = 24) -> TrainingBatch:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(2, 12)).tolist() for _ in range(responses // group)]
    groups = tuple(index // group for index in range(responses))
    answers = tuple(rng.integers(3, VOCABULARY, rng.integers(1, longest)).tolist() for _ in groups)
    return TrainingBatch(tuple(prompts[g] for g in groups), answers, tuple(rng.random(responses).tolist()), groups)


def distance(a: Weights, b: Weights) -> float:
    """Euclidean, relative to *b*."""
    assert a.keys() == b.keys()
    norm = sum(float(np.sum(np.square(b[name], dtype=float))) for name in b)
    return float(np.sqrt(sum(float(np.sum(np.square(a[name] - b[name], dtype=float))) for name in b) / norm))


SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01},
    "ppo": {"algorithm": "ppo", "kl_coefficient": 0.1, "gae_lambda": 0.9},
}


def trained(learner: Learner, batches: Sequence[TrainingBatch], critic: bool = False) -> tuple[Weights, Any]:
    """The weights after one update a batch, and the last update's statistics on rank 0."""
    with learner:
        for step, batch in enumerate(batches):
            stats = learner.all("update", learner.prepared(batch, critic), step)
        return learner.weights(), stats[0]


def original_weights(model: str) -> Weights:
    from safetensors.numpy import load_file

    return dict(load_file(f"{model}/model.safetensors"))


def plain_log_probs(module: Any, batch: TrainingBatch) -> list[Any]:
    """Of each response's tokens, one unpadded sequence at a time."""
    return [plain_log_probs_and_entropy(module, batch, index)[0] for index in range(len(batch))]


def plain_log_probs_and_entropy(module: Any, batch: TrainingBatch, index: int) -> tuple[Any, Any]:
    import torch

    prompt, response = batch.prompt_token_ids[index], batch.response_token_ids[index]
    tokens = torch.tensor([[*prompt, *response]])
    log_probs = torch.log_softmax(module(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1], dim=-1)
    return log_probs.gather(-1, tokens[0, len(prompt) :, None])[:, 0], -(log_probs.exp() * log_probs).sum(dim=-1)


def plain_model(folder: str | Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- Tests ---


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_ranks_and_micro_batches_do_not_change_the_result(learner: Make, model: str, algorithm: str) -> None:
    batches = [batch_of(1), batch_of(2)]
    # The last mini-batch has one prompt: two ranks share two responses of unequal length.
    settings = {**SETTINGS[algorithm], "mini_batch_prompts": 2, "learning_rate": 2e-4}
    critic = algorithm == "ppo"
    one, stats = trained(learner(1, micro_batch_tokens=10_000, **settings), batches, critic)
    many, many_stats = trained(learner(1, micro_batch_tokens=40, **settings), batches, critic)
    two, two_stats = trained(learner(2, micro_batch_tokens=40, **settings), batches, critic)
    moved = distance(one, original_weights(model))
    assert moved > 1e-3
    assert many_stats.micro_batches > two_stats.micro_batches > stats.micro_batches == stats.mini_batches == 3
    for other, other_stats in ((many, many_stats), (two, two_stats)):
        assert distance(other, one) < min(1e-5, 1e-2 * moved)
        for name in ("loss", "value_loss", "kl", "policy_kl", "entropy", "gradient_norm", "critic_gradient_norm"):
            if getattr(stats, name) is not None:
                assert getattr(other_stats, name) == pytest.approx(getattr(stats, name), rel=1e-2, abs=1e-4), name
    assert two_stats.communication_s > 0 == stats.communication_s


def test_a_rank_without_work_takes_part(learner: Make) -> None:
    alone = TrainingBatch(((5, 6),), ((7, 8, 9),), (1.0,), (0,))
    settings: dict[str, Any] = {"kl_coefficient": 0.1, "entropy_coefficient": 1.0}
    one, _ = trained(learner(1, **settings), [alone])
    two, stats = trained(learner(2, **settings), [alone])
    assert distance(two, one) < 1e-5
    assert stats.micro_batches == 1


def test_an_update_equals_a_plain_loop(learner: Make, model: str) -> None:
    import torch

    batch = batch_of(4, responses=8, group=4)
    coefficients = {"kl_coefficient": 0.2, "entropy_coefficient": 0.05, "weight_decay": 0.1, "gradient_clip": 0.5}
    with learner(2, **coefficients, micro_batch_tokens=50, mini_batch_prompts=1) as two:
        prepared = two.prepared(batch)
        assert prepared.old_log_probs is not None
        # As if sampled from another policy, so that ratio, clip and KL count.
        noise = np.random.default_rng(0)
        shifted = tuple(column + noise.normal(0, 0.2, len(column)) for column in prepared.old_log_probs)
        stats = two.all("update", replace(prepared, old_log_probs=shifted, ref_log_probs=shifted), 7)[0]
        found = two.weights()

    module = plain_model(model)
    for column, wanted in zip(prepared.old_log_probs, plain_log_probs(module, batch), strict=True):
        np.testing.assert_allclose(column, wanted.detach(), atol=1e-4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)
    plain_losses, norms, clipped = [], [], 0
    for group in (range(4), range(4, 8)):
        rewards = [batch.rewards[index] for index in group]
        total = torch.zeros(())
        for index in group:
            log_probs, entropy = plain_log_probs_and_entropy(module, batch, index)
            advantage = (batch.rewards[index] - np.mean(rewards)) / np.std(rewards, ddof=1)
            total = total - 0.05 * entropy.sum()
            for log_prob, old in zip(log_probs, shifted[index].tolist(), strict=True):
                ratio = torch.exp(log_prob - old)
                pair = ratio * advantage, torch.clip(ratio, 0.8, 1.2) * advantage
                clipped += int(pair[1] < pair[0])
                total = total - min(pair) + 0.2 * (torch.exp(old - log_prob) - (old - log_prob) - 1)
        loss = total / sum(len(batch.response_token_ids[index]) for index in group)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        optimizer.step()
        plain_losses.append(float(loss.detach()))
    plain = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    assert distance(found, plain) < 1e-5
    assert distance(plain, original_weights(model)) > 1e-3
    assert stats.loss == pytest.approx(np.mean(plain_losses), rel=1e-3)
    assert stats.gradient_norm == pytest.approx(np.mean(norms), rel=1e-3)
    assert stats.clip_fraction == pytest.approx(clipped / batch.response_tokens, abs=0.02)
    assert 0.1 < stats.clip_fraction < 0.6
    assert (stats.step, stats.weights_version, stats.tokens) == (7, 1, sum(batch.sequence_tokens()))


def test_an_update_of_ppo_equals_a_plain_loop(learner: Make, model: str) -> None:
    import torch
    from transformers import AutoModel

    batch, noise = batch_of(12, responses=4), np.random.default_rng(1)
    settings = {"kl_coefficient": 0.3, "discount": 0.9, "gae_lambda": 0.8, "value_clip": 0.1, "weight_decay": 0.0}
    with learner(2, algorithm="ppo", micro_batch_tokens=50, gradient_clip=0.5, **settings) as two:
        prepared = two.prepared(batch, critic=True)
        assert prepared.old_log_probs is not None
        assert prepared.values is not None
        assert all(not column.any() for column in prepared.values)
        old = [column + noise.normal(0, 0.2, len(column)) for column in prepared.old_log_probs]
        ref = [column + noise.normal(0, 0.2, len(column)) for column in old]
        values = [noise.normal(0, 0.5, len(column)) for column in old]
        columns = {"old_log_probs": tuple(old), "ref_log_probs": tuple(ref), "values": tuple(values)}
        stats = two.all("update", replace(prepared, **columns), 0)[0]
        found_weights, found_values = two.weights(), two.prepared(batch, critic=True).values

    advantages, returns = [], []
    for index, column in enumerate(values):
        rewards = -0.3 * (old[index] - ref[index])
        rewards[-1] += batch.rewards[index]
        delta = rewards + 0.9 * np.append(column[1:], 0.0) - column
        estimates = [sum(0.72**k * each for k, each in enumerate(delta[t:])) for t in range(len(column))]
        advantages.append(np.array(estimates))
        returns.append(np.array(estimates) + column)
    mean, deviation = np.concatenate(advantages).mean(), np.concatenate(advantages).std()

    actor, tokens = plain_model(model), batch.response_tokens
    body = AutoModel.from_pretrained(model, dtype=torch.float32)
    head = torch.nn.Linear(body.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    policy_loss, value_loss = torch.zeros(()), torch.zeros(())
    for index, log_probs in enumerate(plain_log_probs(actor, batch)):
        ratio = torch.exp(log_probs - torch.tensor(old[index]))
        advantage = torch.tensor((advantages[index] - mean) / deviation)
        policy_loss = policy_loss - torch.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage).sum() / tokens
        value, before, wanted = (
            plain_values(body, head, batch, index),
            *map(torch.tensor, (values[index], returns[index])),
        )
        near = torch.minimum(torch.maximum(value, before - 0.1), before + 0.1)
        value_loss = value_loss + 0.5 * torch.maximum((value - wanted) ** 2, (near - wanted) ** 2).sum() / tokens
    critic = [*body.parameters(), *head.parameters()]
    for loss, parameters in ((policy_loss, list(actor.parameters())), (value_loss, critic)):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0).step()
    assert stats.loss == pytest.approx(float(policy_loss.detach()), rel=1e-3, abs=1e-5)
    assert stats.value_loss == pytest.approx(float(value_loss.detach()), rel=1e-3)
    plain = {name: parameter.detach().numpy() for name, parameter in actor.named_parameters()}
    assert distance(found_weights, plain) < 1e-5
    assert found_values is not None
    for index, column in enumerate(found_values):
        np.testing.assert_allclose(column, plain_values(body, head, batch, index).detach(), atol=1e-4)
    assert max(float(np.abs(column).max()) for column in found_values) > 1e-2


def plain_values(body: Any, head: Any, batch: TrainingBatch, index: int) -> Any:
    """Before each token of one response."""
    import torch

    tokens = [*batch.prompt_token_ids[index], *batch.response_token_ids[index]]
    hidden = body(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return head(hidden)[len(batch.prompt_token_ids[index]) - 1 : -1, 0]


def test_exported_weights_are_the_learners(learner: Make, model: str, tmp_path: Path) -> None:
    batch, folder = batch_of(5), tmp_path / "weights"
    with learner(2) as two:
        two.all("update", two.prepared(batch), 0)
        scored = two.prepared(batch)  # leaves nothing gathered that the export would miss
        moved = two.all("export_weights", str(folder))
        gathered = two.weights()
        two.fails(r"OSError.*exists", "export_weights", str(folder))
        assert two.all("offload")[0].bytes == two.all("onload")[0].bytes == 0
    assert original_weights(str(folder)).keys() == original_weights(model).keys()
    assert distance(original_weights(str(folder)), gathered) == 0.0
    assert distance(gathered, original_weights(model)) > 1e-3
    assert [each.bytes for each in moved] == [sum(array.nbytes for array in gathered.values()), 0]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert scored.old_log_probs is not None
    for column, wanted in zip(scored.old_log_probs, plain_log_probs(plain_model(folder), batch), strict=True):
        np.testing.assert_allclose(column, wanted.detach(), atol=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_resumed_run_is_the_same_to_the_bit(learner: Make, tmp_path: Path, algorithm: str) -> None:
    settings, critic, folder = SETTINGS[algorithm], algorithm == "ppo", str(tmp_path / "checkpoint")
    with learner(2, **settings) as whole:
        for step in range(2):
            whole.all("update", whole.prepared(batch_of(step), critic), step)
        whole.ranks.all(2, random_number)
        whole.all("save_checkpoint", folder)
        saved = whole.weights()
        chance = whole.ranks.all(2, random_number)
        whole.all("update", whole.prepared(batch_of(2), critic), 2)
        wanted = whole.weights()
    with learner(2, **settings) as resumed:
        assert resumed.all("load_checkpoint", folder) == [2, 2]
        assert resumed.ranks.all(2, random_number) == chance
        assert chance[0] != chance[1]
        assert distance(resumed.weights(), saved) == 0.0
        stats = resumed.all("update", resumed.prepared(batch_of(2), critic), 2)
        assert distance(resumed.weights(), wanted) == 0.0
        assert stats[0].weights_version == 3
    with learner(1, **settings) as alone:
        assert alone.all("load_checkpoint", folder) == [2]
        assert distance(alone.weights(), saved) == 0.0


def interrupt_writing(state: dict[str, Any]) -> None:
    """Let the next checkpoint stop where all is written but the marker."""
    from simrl.real_backend import learner

    whole = learner._complete

    def full_disk(*arguments: object) -> None:
        learner._complete = whole
        raise OSError("no space left on device")

    learner._complete = full_disk


def test_an_interrupted_checkpoint_never_looks_complete(learner: Make, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with learner(2) as two:
        two.ranks.all(1, interrupt_writing)
        two.fails(r"OSError.*no space left", "save_checkpoint", str(folder))
        assert not folder.exists()
        (left,) = set(tmp_path.glob("checkpoint*"))
        for missing in (folder, left):
            with pytest.raises(RankFailed, match=r"ValueError.*no complete checkpoint"):
                two.ranks.all(1, call, "load_checkpoint", str(missing))
        two.all("save_checkpoint", str(folder))
        assert set(tmp_path.glob("checkpoint*")) == {folder}
        assert two.all("load_checkpoint", str(folder)) == [0, 0]
        for file in folder.glob("*.distcp"):
            os.truncate(file, 100)
        two.fails(r"ValueError.*cannot be loaded: rank \d", "load_checkpoint", str(folder))


def test_other_ways_of_computing_give_the_same(learner: Make, tmp_path: Path) -> None:
    batch = batch_of(6)
    usual, _ = trained(learner(1), [batch])
    thrifty, _ = trained(learner(1, activation_checkpointing=True), [batch])
    assert distance(thrifty, usual) < 1e-6
    with learner(2, dtype="bfloat16") as half:
        stats = half.all("update", half.prepared(batch), 0)[0]
        exported = half.all("export_weights", str(tmp_path / "half"))[0]
    assert 0 < stats.gradient_norm < 1e3
    assert exported.bytes == sum(array.nbytes for array in usual.values()) // 2


def test_temperature_belongs_to_the_log_probs(learner: Make, model: str) -> None:
    import torch

    batch = batch_of(7, responses=2)
    with learner(1, temperature=2.0) as warm:
        (column, _) = warm.prepared(batch).old_log_probs or ()
    prompt, response = batch.prompt_token_ids[0], batch.response_token_ids[0]
    logits = plain_model(model)(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits.detach() / 2, dim=-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    np.testing.assert_allclose(column, wanted, atol=1e-4)


def test_what_is_missing_is_named(learner: Make) -> None:
    batch = batch_of(8)
    with learner(1, kl_coefficient=0.1) as one:
        for wanted in ("old_log_probs", "ref_log_probs"):
            with pytest.raises(RankFailed, match=rf"ValueError.*no {wanted}"):
                one.all("update", replace(one.prepared(batch), **{wanted: None}), 0)
        with pytest.raises(RankFailed, match=r"ValueError.*no critic"):
            one.all("values", batch)


@pytest.mark.parametrize(
    "wrong",
    [{"algorithm": "dapo"}, {"world": 0}, {"learning_rate": 0.0}, {"kl_coefficient": -0.1}, {"micro_batch_tokens": 0}],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    from simrl.real_backend.learner_settings import LearnerSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(LearnerSettings("model", 0, 1, "file:///tmp/x"), **wrong)


def test_settings_and_batches_are_free_of_torch() -> None:
    code = "import sys, simrl.real_backend.learner_settings, simrl.real_backend.batch, simrl.real_backend.rewards"
    loaded = subprocess.run(
        [sys.executable, "-c", code + "; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers"} & set(loaded.stdout.split())


def test_ranks_listen_on_the_loopback_interface_only(learner: Make) -> None:
    with learner(2) as two:
        two.all("log_probs", batch_of(9))
        addresses = [address for found in two.ranks.all(2, listening_addresses) for address in found]
    assert set(addresses) == {"0100007F"}


def test_the_reward_rises(learner: Make, model: str) -> None:
    task, rewards = ResidueTask(vocabulary=VOCABULARY), []
    with learner(2, learning_rate=2e-3, weight_decay=0.0, mini_batch_prompts=4) as two:
        for step in range(10):
            prompts = task.prompts(step, seed=0)
            responses = ranks_sample(two, prompts, step)
            asked = [prompt for prompt in prompts for _ in range(8)]
            scored = tuple(map(task.reward, asked, responses))
            groups = tuple(index // 8 for index in range(len(asked)))
            batch = TrainingBatch(tuple(asked), tuple(responses), scored, groups)
            rewards.append(two.all("update", two.prepared(batch), step)[0].reward)
    assert 0.4 < rewards[0] < 0.6
    assert min(rewards[-2:]) > 0.75


def ranks_sample(learner: Learner, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Eight responses of 20 tokens to each prompt."""
    return learner.ranks.all(learner.world, sample, prompts, 8, 20, seed)[0]


def sample(state: dict[str, Any], prompts: list[list[int]], responses: int, tokens: int, seed: int) -> list[list[int]]:
    """Responses of an unsharded copy of the learner's model, at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM

    learner = state["learner"]
    copy = AutoModelForCausalLM.from_pretrained(learner.settings.model_folder, dtype=torch.float32)
    copy.load_state_dict(dict(learner.full_parameters()), strict=False)
    last = torch.tensor([prompt for prompt in prompts for _ in range(responses)])
    chance, past, found = torch.Generator().manual_seed(seed), None, []
    with torch.no_grad():
        for _ in range(tokens):
            output = copy(input_ids=last, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            last = torch.multinomial(torch.softmax(output.logits[:, -1], dim=-1), 1, generator=chance)
            found.append(last)
    return torch.cat(found, dim=1).tolist()


def test_a_missing_rank_is_an_error_and_not_a_hang(ranks: Ranks, learner: Make) -> None:
    with learner(2, timeout_s=3.0) as stalled:
        batch = stalled.prepared(batch_of(10))
        took_s = lost(ranks, r"LearnerLost.*rank 0 of 2: update failed", call, "update", batch, 0)
        assert 2.0 < took_s < 10.0
    dying = learner(2, timeout_s=30.0)
    batch = dying.prepared(batch_of(11))
    try:
        ranks.processes[1].kill()
        assert lost(ranks, r"LearnerLost.*rank 0 of 2: update failed", call, "update", batch, 0) < 15.0
        ranks.all(1, close)
        alone = replace(dying.settings, rendezvous=dying.settings.rendezvous + "-alone", timeout_s=2.0)
        assert 1.0 < lost(ranks, r"LearnerLost.*rank 0 of 2 did not meet", make, alone) < 10.0
        lost(ranks, r"LearnerLost.*missing0", make, replace(alone, interface="missing0"))
    finally:
        ranks.restart()


def lost(ranks: Ranks, match: str, function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until rank 0 finds that the other one does not take part."""
    started_s = time.monotonic()
    ranks.send(0, function, *arguments)
    with pytest.raises(RankFailed, match=match):
        ranks.result(0)
    return time.monotonic() - started_s
