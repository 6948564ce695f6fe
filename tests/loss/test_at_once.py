"""The gradient that is taken together with a value is the ordinary one, and nothing else is kept."""

import weakref

import torch
from torch import Tensor, nn

from spd_hydra.loss.at_once import is_mapped, with_gradient


def inputs() -> tuple[Tensor, Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    a, b, p = (torch.rand(3, 4, generator=generator) for _ in range(3))
    return a.requires_grad_(), b, nn.Parameter(p)


def test_value_and_gradients_are_those_of_the_function() -> None:
    a, b, p = inputs()

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (x.square() * y * p.exp()).sum()

    middle = a * 3  # through which the gradient goes on
    found = with_gradient(lambda tensors: f(tensors[0], tensors[1]), [middle, b, p])
    gradients = torch.autograd.grad(2 * found, [a, p])
    wanted = 2 * f(a * 3, b)
    torch.testing.assert_close(found, wanted / 2)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, [a, p]))


def test_what_the_function_does_not_use_gets_no_gradient() -> None:
    a, b, p = inputs()
    found = with_gradient(lambda tensors: (tensors[0] * b).sum(), [a * 1, p])
    gradients = torch.autograd.grad(found, [a, p], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients[0], b)
    assert not gradients[1].any()


def test_a_gradient_that_comes_by_two_ways_is_counted_once_each() -> None:
    a, _, p = inputs()
    h = a * p  # p is read through h and directly
    found = with_gradient(lambda tensors: (tensors[0] * p).sum(), [h, p])
    (gradient,) = torch.autograd.grad(found, p)
    torch.testing.assert_close(gradient, 2 * a.detach() * p.detach())


def test_what_was_computed_on_the_way_is_gone() -> None:
    a, _, p = inputs()
    made: list[weakref.ref[Tensor]] = []

    def f(tensors: list[Tensor]) -> Tensor:
        middle = tensors[0].exp()
        made.append(weakref.ref(middle))
        return (middle * middle.sin()).sum()

    found = with_gradient(f, [a * 1, p])
    assert found.requires_grad
    assert made[0]() is None


def test_mapping_over_replicas_is_noticed() -> None:
    seen: list[bool] = [is_mapped()]

    def f(x: Tensor) -> Tensor:
        seen.append(is_mapped())
        return x

    torch.vmap(f)(torch.ones(2))
    assert seen == [False, True]
