"""Several threads, one model: no output depends on what another call wrote, and every forward sees one state whole."""

import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.contract import here
from lora_lite.core import quiet as quiet_module
from lora_lite.core.quiet import quiet
from lora_lite.testing import toy
from tests.oracles.kinds import one_of_each_kind

pytestmark = pytest.mark.long
ROWS, LENGTH = 6, 4
X = toy.inputs(ROWS, LENGTH, toy.WIDTH)
PER_SAMPLE = torch.linspace(0, 1, ROWS)
CALLS = 60  # of one thread every day; the long run makes ten thousand


def adapted(name: str = "lora") -> nn.Module:
    model = toy.toy().eval()
    toy.perturb(toy.attached(model, ll.get(name), toy.small(ll.get(name))))
    return model


@torch.no_grad()
def output(model: nn.Module, coeff: object = None) -> torch.Tensor:
    if coeff is None:
        return model(X)
    if coeff == "disabled":
        with ll.disabled(model):
            return model(X)
    with ll.scaled(model, coeff):  # type: ignore[arg-type]
        return model(X)


def side_by_side(works: list[Callable[[], None]], seconds: float = 120) -> None:
    """Run the functions in threads of their own; the first error of any is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


@pytest.mark.filterwarnings("ignore:coeff outside")
@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
def test_blocks_belong_to_their_thread(name):
    """Numbers, values per sample and no adapter at all, in threads that enter and leave at will."""
    compare_in_threads(name, CALLS // 10)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:coeff outside")
def test_ten_thousand_calls_in_threads():
    compare_in_threads("lora", 2500)


def compare_in_threads(name: str, calls: int) -> None:
    model = adapted(name)
    coefficients = (None, "disabled", 0.5, PER_SAMPLE)
    wanted = [output(model, coeff) for coeff in coefficients]

    def work(coeff: object, want: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                assert torch.equal(output(model, coeff), want)

        return run

    side_by_side([work(*one) for one in zip(coefficients, wanted)])
    assert torch.equal(output(model), wanted[0])


def test_values_per_sample_that_all_threads_share():
    model = adapted()
    ll.scale(model, PER_SAMPLE)
    want = output(model)

    def work() -> None:
        for _ in range(CALLS):
            assert torch.equal(output(model), want)

    side_by_side([work] * 4)


def test_blocks_nest_and_nothing_acts_in_a_disabled_one():
    model = adapted()
    base, one, half = output(model, "disabled"), output(model), output(model, 0.5)
    with ll.scaled(model, 0.5):
        assert torch.equal(output(model), half)
        with ll.disabled(model):
            assert torch.equal(output(model, 0.7), base)
            ll.scale(model, 2.0)
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), half)
        assert torch.equal(output(model, 1.0), one)
        assert torch.equal(output(copy.deepcopy(model)), output(model, 2.0))  # the block knows the model, not its copies
    assert {row.coeff for row in ll.status(model).layers} == {2.0}


def test_gains_by_pattern_in_a_block():
    model = adapted()
    gains = {"blocks.0": 0.25}
    with ll.scale(model, gains):
        want = output(model)
    assert torch.equal(output(model, gains), want)
    assert not torch.equal(output(model), want)


def changes(model: nn.Module, tmp_path) -> dict[str, Callable[[], None]]:
    """What may happen beside running forwards, each there and back."""
    ll.save(model, tmp_path / "a.safetensors")

    def merged() -> None:
        ll.merge(model)
        ll.unmerge(model)

    def loaded() -> None:
        ll.load(model, tmp_path / "a.safetensors", name="second")
        ll.detach(model, "second")

    def another() -> None:
        ll.attach(model, ll.config("lora", r=2), name="third")
        ll.detach(model, "third")

    def rescaled() -> None:
        with ll.scale(model, 2.0):
            pass

    return {"merge": merged, "load": loaded, "attach": another, "scale": rescaled}


@pytest.mark.parametrize("change", ["merge", "load", "attach", "scale"])
def test_every_forward_sees_one_state_whole(change, tmp_path):
    """Of merge, load, scale and attach beside three threads that run the model: the state before or the one after."""
    model = adapted()
    act = changes(model, tmp_path)[change]
    states = [output(model)]
    if change == "merge":
        ll.merge(model)
        states.append(output(model))
        ll.unmerge(model)
    elif change == "load":
        with ll.load(model, tmp_path / "a.safetensors", name="second"):
            states.append(output(model))
    elif change == "scale":
        states.append(output(model, 2.0))
    done, seen = threading.Event(), [0] * len(states)

    def run() -> None:
        while not done.is_set():
            found = output(model)
            which = [k for k, state in enumerate(states) if torch.equal(found, state)]
            assert which, "a forward saw a state between two"
            seen[which[0]] += 1

    def swap() -> None:
        try:
            for _ in range(8):
                act()
                time.sleep(0.002)
        finally:
            done.set()

    side_by_side([run, run, run, swap])
    assert sum(seen) > 8
    assert torch.equal(output(model), states[0])


def test_a_change_in_the_midst_of_a_forward_of_the_same_thread_is_refused():
    model = adapted()
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: ll.merge(model))
    with pytest.raises(ll.LoraLiteError, match=r"A forward of .* is running in this thread"):
        model(X)
    hook.remove()
    assert torch.equal(output(model), output(adapted()))


def test_a_forward_that_never_ends_is_waited_for_and_named(monkeypatch):
    monkeypatch.setattr(quiet_module, "PATIENCE", 0.2)
    model, inside, leave = adapted(), threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            leave.wait(20)

    hook = model.blocks[1].register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: output(model), daemon=True)
    thread.start()
    inside.wait(20)
    before = output(model)
    with pytest.raises(ll.LoraLiteError, match="running in other threads"):
        ll.merge(model)
    assert torch.equal(output(model), before)
    leave.set()
    thread.join(20)
    hook.remove()
    ll.merge(model)
    assert not nn.modules.module._global_forward_pre_hooks


def test_models_beside_are_not_stopped():
    model, other, ran = adapted(), adapted(), []
    with quiet(model):
        side_by_side([lambda: ran.append(output(other))], seconds=20)
    assert torch.equal(ran[0], output(model))


class Twice(nn.Module):
    """Blocks that are computed again in backward: reentrant True or False; None: kept."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.reentrant, self.blocks = reentrant, toy.toy().blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_recomputation_runs_with_the_coefficients_of_its_forward(reentrant, elsewhere):
    """Five forwards in other blocks each, one backward outside of all, in this thread or another."""
    gradients = []
    for kind in (None, reentrant):
        model = Twice(kind)
        handle = toy.perturb(ll.attach(model, ll.config("lora", r=2)))
        x = X.clone().requires_grad_(True)
        outputs = []
        each = [ll.scaled(model, 1.5), ll.scaled(model, -0.5), ll.disabled(model), ll.scaled(model, 0.0)]
        for block in [*each, ll.scale(model, PER_SAMPLE)]:
            with block:
                outputs.append(model(x))
        loss = sum((k + 1) * y.square().mean() for k, y in enumerate(outputs))
        if elsewhere:
            side_by_side([loss.backward])
        else:
            loss.backward()
        gradients.append(torch.cat([g.flatten() for g in (x.grad, *(p.grad for p in handle.parameters())) if g is not None]))
        del outputs, loss
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()
    assert not here.noted
    assert not here.blocks


def test_blocks_of_a_compiled_model_hold_for_their_thread():
    model = adapted()
    coefficients = ("disabled", 0.5, 2.0, None, PER_SAMPLE)
    wanted = [output(model, coeff) for coeff in coefficients]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def run(coeff: object) -> torch.Tensor:
        with torch.no_grad():
            if coeff is None:
                return compiled(X)
            with ll.disabled(model) if coeff == "disabled" else ll.scaled(model, coeff):
                return compiled(X)

    for _ in range(2):
        for coeff, want in zip(coefficients, wanted):
            torch.testing.assert_close(run(coeff), want, rtol=1e-6, atol=1e-6)
