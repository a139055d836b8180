"""A probe inside of a training on several processes: they probe together, and the training is what it would be."""

from __future__ import annotations

import pytest
import torch

from probe.data.batch import RolloutBatch
from probe.distributed.ranks import ALONE, Ranks
from probe.distributed.same import fingerprint
from probe.errors.exceptions import RanksApartError
from probe.estimators.loss_settings import LossSettings
from probe.live import HostUpdate
from tests.support.live_loops import adamw, attach, lora_model, numbers
from tests.support.trainings import bits, in_processes, set_streams, streams

STEPS = 4


def train(folder, probe=None, apart=False, spoil=None):
    """A loop with DistributedDataParallel, each rank on data of its own: what is left of it, and the probe's history.

    Args:
        folder: nothing.
        probe: settings of the probe; None for none.
        apart: each rank trains a policy of its own.
        spoil: is given the watch and the rank before the loop.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    set_streams(100 + rank)
    torch.manual_seed(rank if apart else 0)
    model = lora_model(seed=rank if apart else 0)
    optimizer = adamw(model)
    forward = model if apart else torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(100 + rank)
    watch = None if probe is None else attach(model, optimizer, **{"strict": False, **probe})
    if spoil is not None:
        spoil(watch, rank)
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(10 * k + rank)
        ids = torch.randint(4, 100, (2, 6), generator=generator)
        forward(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    left = bits([dict(model.named_parameters()), optimizer.state_dict(), streams()])
    if watch is None:
        return left, None, None
    return left, numbers(watch.history), None if watch.error is None else str(watch.error)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_find_the_same_and_leave_no_trace(tmp_path, ranks):
    plain = in_processes(ranks, train, tmp_path)
    probed = in_processes(ranks, train, tmp_path, {"B_E": 8, "microbatch_size": 2})
    assert [one[0] for one in plain] == [one[0] for one in probed]
    assert plain[0][0] != plain[1][0]  # their random streams
    histories = [one[1] for one in probed]
    assert [len(history) for history in histories] == [STEPS] * ranks
    assert all(bits(history) == bits(histories[0]) for history in histories)
    assert all(abs(entry["deltaH_true_tok"]) > 0 for entry in histories[0])


def test_it_is_shared_out(tmp_path):
    shared = in_processes(2, counted, tmp_path)
    assert all(0 < useful < sum(shared) for useful in shared)


def counted(folder):
    """Tokens that went through the model of this rank after attaching."""
    found = {}

    def keep(watch, rank):
        found["watch"], found["before"] = watch, watch._probe.traffic.useful

    train(folder, {"B_E": 8, "microbatch_size": 2}, spoil=keep)
    return found["watch"]._probe.traffic.useful - found["before"]


def test_ranks_that_train_policies_of_their_own_are_not_mixed(tmp_path):
    first, second = in_processes(2, train, tmp_path, {}, True)
    assert first[2] is None
    assert len(first[1]) == STEPS
    assert second[1] == []
    plain = in_processes(2, train, tmp_path, None, True)
    assert [one[0] for one in plain] == [first[0], second[0]]


def break_second(watch, rank):
    """An error of the second rank in the middle of its second probe."""
    if rank != 1:
        return
    after = watch._probe.after

    def broken(before, *rest):
        if before.number == 2:
            raise RuntimeError("a broken rank")
        return after(before, *rest)

    watch._probe.after = broken


def move_second(watch, rank):
    """Other weights on the second rank."""
    if rank == 1:
        with torch.no_grad():
            next(iter(watch._probe.parameters.values())).add_(1e-3)


@pytest.mark.parametrize(
    ("spoil", "probes", "said"),
    [(break_second, 1, "a broken rank"), (move_second, 0, "expected the same trained parameters")],
)
def test_what_fails_on_one_rank_ends_the_probe_on_all_and_not_the_training(tmp_path, spoil, probes, said):
    for _, history, error in in_processes(2, train, tmp_path, {}, False, spoil):
        assert len(history) == probes
        assert said in error


def detach_first(watch, rank):
    """The first rank detaches after its second probe, as an alarm's function may do."""
    if rank == 0:
        after = watch._probe.after

        def last(before, *rest):
            found = after(before, *rest)
            if before.number == 2:
                watch._hooks.detach()
            return found

        watch._probe.after = last


def other_number(watch, rank):
    """The second rank has been resumed at another step."""
    if rank == 1:
        watch._history.run.step += 7


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(detach_first, "detached on another rank"), (other_number, "expected all ranks at one update")],
)
def test_ranks_that_do_not_go_on_together_end_the_probe_and_not_the_training(tmp_path, spoil, said):
    plain = in_processes(2, train, tmp_path)
    found = in_processes(2, train, tmp_path, {}, False, spoil)
    assert [one[0] for one in found] == [one[0] for one in plain]
    assert said in found[1][2]
    assert len(found[0][1]) <= 2


def broken_forecast(watch, rank):
    """An entropy that one rank notes, and cannot look ahead from."""
    if rank == 1:
        after, noted = watch._probe.after, watch._updates

        def broken(before, *rest):
            found = after(before, *rest)
            if before.number == 3:
                noted._guarded(lambda: 1 / 0, ALONE)
            return found

        watch._probe.after = broken


def suspicion(watch, rank):
    """One rank finds that parameters move outside of the step."""
    if rank == 1:
        after = watch._probe.after

        def found_out(before, *rest):
            if before.number == 2:
                watch._updates.probe_early("seen on one rank")
            return after(before, *rest)

        watch._probe.after = found_out


@pytest.mark.parametrize("spoil", [broken_forecast, suspicion])
def test_what_one_rank_alone_finds_keeps_nobody_waiting(tmp_path, spoil):
    plain = in_processes(2, train, tmp_path)
    found = in_processes(2, train, tmp_path, {}, False, spoil)
    assert [one[0] for one in found] == [one[0] for one in plain]
    assert [one[2] for one in found] == [None, None]
    assert len(found[0][1]) == len(found[1][1]) >= STEPS - 1


def attached_by_one(folder):
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        torch.distributed.barrier()
        return "waits"
    try:
        Ranks.of_job(seconds=1.0)
    except RanksApartError as error:
        torch.distributed.barrier()
        return str(error)


def test_a_probe_that_is_attached_on_one_rank_says_so(tmp_path):
    text, _ = in_processes(2, attached_by_one, tmp_path)
    assert "expected all 2 processes of the job to take part, found the ranks [0] only" in text


def test_fingerprints_see_one_bit_and_the_place():
    one = torch.arange(6.0)
    other = one.clone()
    other[3] += 1e-6
    assert fingerprint([one]) == fingerprint([one.clone()])
    assert fingerprint([one]) != fingerprint([other])
    assert fingerprint([one[:3], one[3:]]) != fingerprint([one[3:], one[:3]])
    for dtype in (torch.bfloat16, torch.float64, torch.uint8):
        assert fingerprint([one.to(dtype)]) != fingerprint([(one + 1).to(dtype)])


# ---------------------------------------------------------------- the training's own batch


def own_rows(k, ranks):
    """Rows of a step of every rank: a prompt of two tokens, a response of five; and their advantages."""
    found = []
    for rank in range(2):
        generator = torch.Generator().manual_seed(10 * k + rank)
        found.append((torch.randint(4, 100, (2, 7), generator=generator), torch.tensor([1.0, -0.5 - rank])))
    if ranks == 2:
        return found
    return [tuple(torch.cat(x) for x in zip(*found, strict=True))]


def as_update(ids, advantages):
    """The rows as the probe takes them, with the loss of the loop below."""
    rows = ids.tolist()
    batch = RolloutBatch(
        prompts=("",) * len(rows),
        completions=("",) * len(rows),
        prompt_ids=tuple(tuple(row[:2]) for row in rows),
        completion_ids=ids[:, 2:],
        mask=torch.ones(len(rows), 5, dtype=torch.bool),
        truncated=torch.ones(len(rows), dtype=torch.bool),
        group=torch.arange(len(rows)),
        advantages=advantages.double(),
    )
    return HostUpdate(batch, LossSettings(loss="reinforce"))


def reinforce(folder, ranks):
    """A loop with a policy gradient on given rows, whose batch the probe is told: the probe's history."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    model = lora_model(seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = adamw(model)
    forward = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    now = {}
    watch = attach(
        model, optimizer, update=lambda policy: as_update(*now["rows"]), B_E=8, microbatch_size=2, strict=True
    )
    for k in range(3):
        ids, advantages = now["rows"] = own_rows(k, ranks)[rank]
        logits = forward(input_ids=ids).logits[:, 1:-1].log_softmax(-1)
        l = logits.gather(-1, ids[:, 2:].unsqueeze(-1)).squeeze(-1)
        (-(advantages.unsqueeze(1) * l).sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return numbers(watch.history)


def test_the_tokens_of_all_ranks_are_one_batch(tmp_path):
    (alone,) = in_processes(1, reinforce, tmp_path, 1)
    together = in_processes(2, reinforce, tmp_path, 2)
    assert bits(together[0]) == bits(together[1])
    for one, two in zip(alone, together[0], strict=True):
        assert "attribution_reason" not in one
        assert "attribution_reason" not in two
        assert 0 < one["attribution_scale"] < 0.9
        for name in (
            "attribution_scale",
            "deltaH1_positive_tok",
            "deltaH1_negative_tok",
            "deltaH1_words_tok",
        ):
            assert two[name] == pytest.approx(one[name], rel=1e-3)
