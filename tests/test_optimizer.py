"""AdamW and clipping: against PyTorch's, and what rows that come later need."""

import math

import pytest
import torch

from minildm.optimizer import AdamW, FusedAdamW, MovingAverage, clip_gradients

SHAPES = ((4, 6), (5, 4), (3,))


def parameters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(step, *lists):
    generator = torch.Generator().manual_seed(100 + step)
    for i in range(len(lists[0])):
        gradient = torch.randn(lists[0][i].shape, generator=generator)
        for parameters_ in lists:
            parameters_[i].grad = gradient[: len(parameters_[i])].clone()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_matches_torch_when_nothing_grows(weight_decay):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, weight_decay=weight_decay)
    for step in range(20):
        lr = 1e-2 / (1 + step)
        give_gradients(step, ours, theirs)
        optimizer.step(lr)
        reference.param_groups[0]["lr"] = lr
        reference.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_row_that_comes_later_moves_like_a_parameter_that_comes_later():
    A, B = parameters(shapes=((8, 6), (5, 8)))
    A.data[3], B.data[:, 3] = 0, 0
    optimizer = AdamW([A, B])
    for step in range(50):
        give_gradients(step, [A, B])
        A.grad[3], B.grad[:, 3] = 0, 0
        optimizer.step(1e-2)
    assert A[3].abs().max() == B[:, 3].abs().max() == 0  # not in use: stays zero
    optimizer.restart(A, 3, dim=0)
    optimizer.restart(B, 3, dim=1)
    row, column = torch.nn.Parameter(A.data[3].clone()), torch.nn.Parameter(B.data[:, 3].clone())
    others, reference = A.data.clone(), torch.optim.AdamW([row, column], lr=1e-2, weight_decay=0.0)
    for step in range(50, 60):
        give_gradients(step, [A, B])
        row.grad, column.grad = A.grad[3].clone(), B.grad[:, 3].clone()
        optimizer.step(1e-2)
        reference.step()
        if step == 50:  # with the old count it would be 3.2 lr
            assert B[:, 3].abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    torch.testing.assert_close(A.data[3], row.data, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(B.data[:, 3], column.data, rtol=1e-5, atol=1e-7)
    assert (A.data[0] - others[0]).abs().max() > 0


def test_the_rows_that_were_there_do_not_notice_a_new_one():
    runs = []
    for restart in (False, True):
        (A,) = parameters(shapes=((4, 6),))
        optimizer = AdamW([A])
        for step in range(10):
            if restart and step == 5:
                optimizer.restart(A, 3, dim=0)
            give_gradients(step, [A])
            optimizer.step(1e-2)
        runs.append(A.data[:3])
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


def test_parameters_that_come_later_count_from_then():
    early, late = parameters(), parameters(seed=1, shapes=((2, 2),))
    optimizer = AdamW(early)
    for step in range(30):
        give_gradients(step, early)
        optimizer.step(1e-3)
    optimizer.add(late)
    before = late[0].detach().clone()
    give_gradients(30, early + late)
    optimizer.step(1e-3)
    torch.testing.assert_close((late[0] - before).abs(), torch.full((2, 2), 1e-3), rtol=1e-3, atol=1e-8)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    runs = []
    for interrupted in (False, True):
        ours = parameters()
        optimizer = AdamW(ours, weight_decay=0.01)
        for step in range(12):
            if step == 4:
                optimizer.restart(ours[0], 2, dim=0)
            if interrupted and step == 8:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                ours = [torch.nn.Parameter(p.data.clone()) for p in ours]
                optimizer = AdamW(ours, weight_decay=0.01)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            give_gradients(step, ours)
            optimizer.step(1e-2)
        runs.append(ours)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("age", [-1, 10**10, 1.0, (0, torch.ones(3)), (2, torch.ones(3, dtype=torch.float64)), None])
def test_a_state_with_impossible_ages_is_refused(age):
    optimizer = AdamW(parameters())
    state = optimizer.state_dict()
    state["ages"][0] = age
    with pytest.raises(ValueError, match="ages of other parameters"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "name, value", [("step", torch.tensor(-3.0)), ("step", torch.tensor(math.inf)), ("exp_avg", torch.zeros(()))]
)
def test_a_state_of_other_parameters_is_refused_by_fused_adamw(name, value):
    ours = parameters()
    fused = FusedAdamW(ours)
    give_gradients(0, ours)
    fused.step(1e-2)
    state = fused.state_dict()
    state["state"][0][name] = value
    with pytest.raises(ValueError, match=r"other parameters|another list of parameters"):
        FusedAdamW(ours).load_state_dict(state)


def test_clipping_really_clips_and_tells_the_norm_before():
    ours, theirs = parameters(), parameters()
    give_gradients(0, ours, theirs)
    norm = clip_gradients(ours, 0.5)
    reference = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, reference)
    assert norm > 3
    assert torch.cat([p.grad.flatten() for p in ours]).norm().item() == pytest.approx(0.5, rel=1e-5)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad)


def test_clipping_leaves_small_gradients_and_0_is_off():
    for largest in (1e6, 0):
        ours, same = parameters(), parameters()
        give_gradients(0, ours, same)
        clip_gradients(ours, largest)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, same))


def test_clipping_refuses_an_iterator():
    with pytest.raises(AssertionError, match="list"):
        clip_gradients(iter(parameters()), 1.0)


def test_a_parameter_without_gradient_keeps_value_means_and_age():
    ours = parameters()
    optimizer = AdamW(ours, weight_decay=0.1)
    for step in range(3):
        give_gradients(step, ours)
        optimizer.step(1e-2)
    before = ours[1].detach().clone(), optimizer.means[1].clone(), optimizer.squares[1].clone()
    give_gradients(3, ours)
    ours[1].grad = None
    optimizer.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, (ours[1], optimizer.means[1], optimizer.squares[1])))
    assert optimizer.ages == [4, 3, 4]


def test_factors_scale_the_learning_rate_of_each_parameter():
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, [1.0, 0.1, 0.0], weight_decay=0.1)
    groups = [{"params": [p], "lr": 1e-2 * factor} for p, factor in zip(theirs, (1.0, 0.1, 0.0))]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(5):
        give_gradients(step, ours, theirs)
        optimizer.step(1e-2)
        reference.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("interrupted", [False, True])
def test_fused_adamw_equals_adamw_and_continues_from_its_state(tmp_path, interrupted):
    ours, theirs = parameters(), parameters()
    optimizer, fused = AdamW(ours, [1, 2, 3], weight_decay=0.1), FusedAdamW(theirs, [1, 2, 3], weight_decay=0.1)
    for step in range(8):
        if interrupted and step == 4:
            torch.save(fused.state_dict(), tmp_path / "state.pt")
            fused = FusedAdamW(theirs, [1, 2, 3], weight_decay=0.1)
            fused.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        give_gradients(step, ours, theirs)
        optimizer.step(1e-2)
        fused.step(1e-2)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_the_moving_average_follows_its_formula_and_swaps():
    (p,) = parameters(shapes=((4, 6),))
    average, expected = MovingAverage(0.9), p.detach().clone()
    average.add({"p": p})
    for step in range(1, 30):
        p.data += 0.1 * step
        average.update(step, {"p": p})
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * p.detach()
    live = p.detach().clone()
    average.swap({"p": p})
    torch.testing.assert_close(p.detach(), expected)
    average.swap({"p": p})
    assert torch.equal(p.detach(), live)


def test_a_row_that_restarts_has_its_present_value_as_average():
    (p,) = parameters(shapes=((4, 6),))
    average = MovingAverage(0.99)
    average.add({"p": p})
    before = p.detach().clone()
    p.data[2] = 7.0
    average.restart("p", p, 2, dim=0)
    assert torch.equal(average.values["p"][2], torch.full((6,), 7.0))
    assert torch.equal(average.values["p"][:2], before[:2])
