"""The samplers against flows whose answer is known."""

import math

import pytest
import torch

from bitdance_core.errors import BitDanceError
from bitdance_core.sampling.flow import (
    SAMPLERS,
    guide,
    make_schedule,
    plan_noise,
    sample_patch,
    velocity_from_x,
)
from bitdance_core.sampling.settings import Sampling


def test_schedule_ends_at_one():
    for sampler in SAMPLERS:
        for shift in (1.0, 3.0):
            schedule = make_schedule(sampler, 7, shift)
            assert len(schedule.times) == len(schedule.lengths) == 8
            assert schedule.times[0] == 0 and sorted(schedule.times) == list(schedule.times)
    assert make_schedule("euler_maruyama", 7, 3.0).times[-1] == 0.95  # unshifted, as published
    assert sum(make_schedule("euler", 7, 3.0).lengths) == pytest.approx(1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sure_prediction_is_reached(sampler):
    """A head that always predicts the same bits leads every sampler there, whatever the noise."""
    target = torch.where(torch.rand(2, 16, 8, generator=torch.Generator().manual_seed(0)) > 0.5, 1.0, -1.0)
    schedule = make_schedule(sampler, 20)
    noise = plan_noise((2, 16, 8), schedule.noise_draws, torch.Generator().manual_seed(1))
    result = sample_patch(lambda x, i: target, noise, schedule, guidance=1.0)
    torch.testing.assert_close(result, target, atol=1e-4, rtol=0)


def gaussian_flow_error(sampler: str, steps: int) -> float:
    """Distance from the exact end of the probability flow for bits ~ N(0, 0.25), where the best prediction is linear.

    With x_t ~ N(0, s_t^2), s_t^2 = (1-t)^2 + t^2/4: E[x1 | x_t] = (t/4) / s_t^2 x_t, and the flow scales x by s_t.
    """
    schedule = make_schedule(sampler, steps)
    noise = plan_noise((1, 64, 64), schedule.noise_draws, torch.Generator().manual_seed(0)).double()

    def predict(x, index):
        t = schedule.times[index]
        return (t / 4) / ((1 - t) ** 2 + t**2 / 4) * x.double()

    return float((sample_patch(predict, noise, schedule, 1.0) - 0.5 * noise[0]).abs().mean())


def test_euler_integrates_the_velocity_not_the_prediction():
    """More steps come closer to the exact flow, but for the closing step's error, which all share."""
    floor = gaussian_flow_error("heun", 400)
    errors = [gaussian_flow_error("euler", n) - floor for n in (10, 20, 40)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


def test_heun_is_of_second_order():
    """Halving the step divides its error by about four, Euler's by about two."""
    exact = gaussian_flow_error("heun", 800)
    euler = [abs(gaussian_flow_error("euler", n) - exact) for n in (20, 40)]
    heun = [abs(gaussian_flow_error("heun", n) - exact) for n in (20, 40)]
    assert 1.7 < euler[0] / euler[1] < 2.4
    assert heun[0] / heun[1] > 3.2
    assert heun[1] < euler[1] / 5


def test_euler_maruyama_keeps_the_distribution():
    """The stochastic sampler ends in the data's spread, not in its mean."""
    schedule = make_schedule("euler_maruyama", 200)
    noise = plan_noise((8, 64, 64), schedule.noise_draws, torch.Generator().manual_seed(0))

    def predict(x, index):
        t = schedule.times[index]
        return (t / 4) / ((1 - t) ** 2 + t**2 / 4) * x

    assert float(sample_patch(predict, noise, schedule, 1.0).std()) == pytest.approx(0.5, abs=0.02)


def test_planned_noise_is_the_official_order():
    """First the start, then a draw a step, from one generator; sizes below torch's vector width included."""
    for shape in ((2, 16, 8), (1, 1, 5)):
        generator = torch.Generator().manual_seed(9)
        expected = torch.stack([torch.randn(shape, generator=generator) for _ in range(4)])
        assert torch.equal(plan_noise(shape, 4, torch.Generator().manual_seed(9)), expected)


def test_guidance():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(cond, uncond, 1.0) == cond and guide(cond, uncond, 0.0) == uncond
    assert guide(cond, uncond, 7.5) == 16


def test_velocity_is_bounded_near_the_end():
    x_pred, x_t = torch.tensor([1.0]), torch.tensor([0.0])
    assert velocity_from_x(x_pred, x_t, 0.5) == 2
    assert math.isclose(velocity_from_x(x_pred, x_t, 0.999).item(), 20, rel_tol=1e-6)


def test_linear_guidance_grows_from_one():
    """It would reach its value just after the last patch; only the first patch has none."""
    sampling = Sampling("euler", 5, 4.0, schedule="linear")
    assert [sampling.guidance_of(i, 4) for i in range(4)] == [1, 1.75, 2.5, 3.25]
    assert [sampling.is_separate(i, 4) for i in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_without_guidance_nothing_is_scheduled(guidance):
    sampling = Sampling("euler", 5, guidance, schedule="linear")
    assert sampling.branches == 1 and not sampling.is_separate(0, 4)
    assert [sampling.guidance_of(i, 4) for i in range(4)] == [guidance] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "unknown guidance schedule 'cosine', have: constant, linear"),
        ({"schedule": "linear", "last_guidance": 3.0}, "'linear' and last_guidance are two schedules"),
    ],
)
def test_schedules_that_cannot_be_are_named(settings, message):
    with pytest.raises(BitDanceError, match=message):
        Sampling("euler", 5, 4.0, **settings)
