"""How third-party models call the layers that this package replaces, and such calls made again."""

from dataclasses import dataclass
from typing import Any

import torch

from tokenmix_ops.testing import max_error


@dataclass
class Call:
    """One call of a module, with what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _kept(value):
    """Tensors as they are now: models write onto some later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_kept(part) for part in value)
    return value


def record(model, names):
    """A dictionary that fills with the calls of the named modules while the model runs."""
    calls = {name: [] for name in names}

    def hook(name):
        def note(_module, args, kwargs, output):
            # A tensor that is passed as query, key and value must stay one.
            tensors = {id(v): _kept(v) for v in (*args, *kwargs.values()) if torch.is_tensor(v)}

            def kept(value):
                return tensors[id(value)] if torch.is_tensor(value) else _kept(value)

            again = tuple(map(kept, args)), {n: kept(v) for n, v in kwargs.items()}
            calls[name].append(Call(*again, _kept(output)))

        return note

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
    return calls


def assert_answered_alike(layer, call, tolerance):
    """A layer takes a recorded call and returns what the original did, in the same form."""
    output = layer(*call.args, **call.kwargs)
    assert type(output) is type(call.output)
    if isinstance(output, tuple):
        assert len(output) == len(call.output)
        output, wanted = output[0], call.output[0]
    else:
        wanted = call.output
    assert output.shape == wanted.shape
    assert max_error(output.detach(), wanted) < tolerance


def pass_besides(module, renamed=(), **more):
    """Has a module called as another version of its library might: arguments renamed, and more."""

    def change(_module, args, kwargs):
        names = dict(renamed)
        return args, {**{names.get(n, n): v for n, v in kwargs.items()}, **more}

    return module.register_forward_pre_hook(change, with_kwargs=True)
