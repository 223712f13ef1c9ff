"""Two processes with gloo: DDP, FSDP2, and the embedded benchmark under `accelerate launch`. One pair serves every check."""

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.checkpoint import read
from lora_lite.sites.sharded import whole
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.oracles import compat_engines as engines
from tests.oracles import guide
from tests.oracles.two_processes import in_two_processes, watched
from tests.whole.test_engines import language_model, run, tensors

X = toy.inputs(3, 5, 24)


def rank() -> int:
    return torch.distributed.get_rank()


def ddp_trains_the_adapter_of_one_process_for_every_kind_of_variant(folder: Path) -> None:
    for name in engines.representatives():
        assert engines.check_ddp(name) == "yes", name


def fsdp2_trains_the_adapter_of_one_process_for_every_kind_of_variant(folder: Path) -> None:
    for name in engines.representatives():
        assert engines.check_fsdp2(name) == "yes", name


def a_sharded_model_is_saved_as_one_process_would_save_it(folder: Path) -> None:
    """Also where layers share tensors. Only what the file holds or fingerprints is gathered."""
    from torch.distributed.tensor import DTensor

    for name in ("lora", "vera"):
        plain, model = engines.adapted(name), engines.adapted(name)
        engines.shard(model)
        model.blocks[0](X)
        with (
            mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gather,
            pytest.warns(ll.LoraLiteWarning, match="never ran"),
        ):
            ll.save(model, folder / f"{name}_sharded")
        trained = [p.shape for p in plain.parameters() if p.requires_grad]
        linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
        bases = [t.shape for m in linears for t in (m.weight, m.bias) if t is not None]
        assert sorted(call.args[0].shape for call in gather.call_args_list) == sorted(trained + bases)
        if rank() == 0:
            ll.save(plain, folder / f"{name}_plain")
            (header, tensors_), (other, others) = read(folder / f"{name}_sharded"), read(folder / f"{name}_plain")
            assert header == other
            assert tensors_.keys() == others.keys()
            assert all(torch.equal(tensor, others[key]) for key, tensor in tensors_.items())


def a_save_that_fails_on_the_first_process_fails_on_all(folder: Path) -> None:
    model = engines.shard(engines.adapted("lora"))
    with pytest.raises(ll.LoraLiteError, match="is a folder"):
        ll.save(model, folder)


def a_file_loads_into_a_plain_model_that_is_then_sharded(folder: Path) -> None:
    plain = engines.adapted("dora")
    if rank() == 0:
        ll.save(plain, folder / "whole")
    torch.distributed.barrier()
    model = toy.toy()
    ll.load(model, folder / "whole")
    engines.shard(model)
    assert error(model(X), plain(X)) < 1e-6


def a_sharded_model_is_scaled_disabled_inspected_and_detached(folder: Path) -> None:
    plain, model = engines.adapted("lora"), engines.shard(engines.adapted("lora"))
    assert ll.status(model).trainable == ll.status(plain).trainable
    assert ll.status(model).lost == []
    for coeff in (0.5, torch.tensor([0.0, 1.0, -0.5])):
        with ll.scale(model, coeff), ll.scale(plain, coeff):
            assert error(model(X), plain(X)) < 1e-6
    with ll.disabled(model):
        assert error(model(X), toy.toy()(X)) < 1e-6
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer._forward_hooks.clear()
    assert len(ll.repair(model)) == 8
    assert error(model(X), plain(X)) < 1e-6
    ll.detach(model)
    assert error(model(X), toy.toy()(X)) < 1e-6


def attach_after_wrapping_is_refused_with_the_right_order(folder: Path) -> None:
    for wrap in (nn.parallel.DistributedDataParallel, engines.shard):
        wrapped = wrap(toy.toy())
        for call in (lambda m=wrapped: ll.attach(m, ll.config("lora")), lambda m=wrapped: ll.load(m, folder / "whole")):
            with pytest.raises(ll.LoraLiteError, match=r"ll.attach\(model, cfg\); model = .*fully_shard and DDP"):
                call()
    model = toy.toy()
    replica = nn.parallel.DistributedDataParallel(model)
    with pytest.warns(ll.LoraLiteWarning, match="Wrap it again"):
        ll.attach(model, ll.config("lora"))
    assert replica.module is model


def a_sharded_model_gives_snapshots_and_refuses_what_needs_whole_weights(folder: Path) -> None:
    plain, model = engines.adapted("lora"), engines.shard(engines.adapted("lora"))
    for key, tensor in ll.snapshot(plain).tensors.items():
        assert torch.equal(ll.snapshot(model).tensors[key], tensor)
    for call in (ll.merge, lambda m: ll.delta_weight(m, "blocks.0.q_proj"), lambda m: ll.export_peft(m, folder / "peft")):
        with pytest.raises(ll.LoraLiteError, match="sharded"):
            call(model)
    assert not (folder / "peft").exists()


def dtypes_may_differ_within_a_shard_group(folder: Path) -> None:
    """A bfloat16 base with a float32 adapter, a float32 model computed in bfloat16: float32 gradients for float32 masters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for dtype, options in ((torch.bfloat16, {}), (torch.float32, {"mp_policy": low})):
        x = toy.inputs(4, 5, toy.WIDTH, seed=100, dtype=dtype)
        for name in engines.representatives():
            gradients = []
            for sharded in (False, True):
                model = engines.adapted(name, dtype)
                run_ = engines.shard(model, **options) if sharded else model
                run_(engines.own_half(x) if sharded else x).float().square().mean().backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                assert {(p.dtype, p.grad.dtype) for p in trained} == {(torch.float32, torch.float32)}
                gradients.append(torch.cat([whole(p.grad).flatten() for p in trained]))
            assert torch.cosine_similarity(*gradients, dim=0) > 0.95, name  # autocast alone costs one of them 0.012


def the_guide_s_blocks_train_the_adapter_of_the_plain_loop(folder: Path) -> None:
    os.chdir(folder)
    code, trained = guide.sections("training"), {}
    for heading in ("Plain PyTorch", "DistributedDataParallel", "FSDP2"):
        block = code[heading][0].replace("weight_decay=0.01", "").replace("adapter.safetensors", f"{heading}-{rank()}")
        if heading != "Plain PyTorch":
            block = block.replace(f"{heading}-{rank()}", heading)
        model = run(block)["model"]
        trained[heading] = {key: whole(tensor) for key, tensor in tensors(model).items()}
        assert rank() or (folder / (f"{heading}-0" if heading == "Plain PyTorch" else heading)).exists()
    wanted = trained.pop("Plain PyTorch")
    for of in trained.values():
        for key, tensor in wanted.items():
            assert error(of[key], tensor) < engines.NOISE


class Uneven:
    """A task of the benchmark with an odd number of rows in a batch, of which some predict fewer tokens."""

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        ids = toy.seeded(lambda: torch.randint(64, (3, 8)), step)
        labels = ids.clone()
        labels[0, :6] = -100
        return {"input_ids": ids, "labels": labels}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"processes_that_score": 1.0}


def the_benchmark_trains_the_adapter_of_one_process(folder: Path) -> None:
    from benchmarks.embedded.run import Settings, train

    settings, trained, curves = Settings(steps=3, device="cpu"), [], []
    for count in (2, 1):
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"} if count == 2 else {"WORLD_SIZE": "1", "RANK": "0"}):
            model = language_model()
            ll.attach(model, ll.config("lora", r=2))
            groups = ll.param_groups(model, lr=1e-2)
            curves.append(train(model, groups, Uneven(), settings, lambda steps, _: steps, ""))  # type: ignore[arg-type]
            trained.append(tensors(model))
    got, wanted = trained
    for key, tensor in wanted.items():
        assert error(got[key], tensor) < engines.NOISE, key
    assert curves[0][0]["loss"] == pytest.approx(curves[1][0]["loss"], rel=1e-6)
    assert ("processes_that_score" in curves[0][0]) == (rank() == 0)


CHECKS = [
    ddp_trains_the_adapter_of_one_process_for_every_kind_of_variant,
    fsdp2_trains_the_adapter_of_one_process_for_every_kind_of_variant,
    a_sharded_model_is_saved_as_one_process_would_save_it,
    a_save_that_fails_on_the_first_process_fails_on_all,
    a_file_loads_into_a_plain_model_that_is_then_sharded,
    a_sharded_model_is_scaled_disabled_inspected_and_detached,
    attach_after_wrapping_is_refused_with_the_right_order,
    a_sharded_model_gives_snapshots_and_refuses_what_needs_whole_weights,
    dtypes_may_differ_within_a_shard_group,
    the_guide_s_blocks_train_the_adapter_of_the_plain_loop,
    the_benchmark_trains_the_adapter_of_one_process,
]


def all_checks(folder: str) -> dict[str, str]:
    """{check: "" or its tracebacks} up to the first that fails in either process: after that they are out of step."""
    found: dict[str, str] = {}
    for check in CHECKS:
        fault = ""
        try:
            check(Path(folder))
        except BaseException:
            fault = traceback.format_exc()
        faults: list[str] = ["", ""]
        torch.distributed.all_gather_object(faults, fault)
        found[check.__name__] = "\n".join(faults).strip()
        if found[check.__name__]:
            break
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_two_processes("tests.whole.test_distributed:all_checks", str(tmp_path_factory.mktemp("files")))[0]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check, found):
    assert found.get(check, "not run: an earlier check failed") == ""


@pytest.mark.parametrize(("first", "words"), [("time.sleep(60)", "2 of 2"), ("raise SystemExit('broken')", "1 of 2")])
def test_processes_that_hang_or_fail_are_ended_and_heard(first, words, tmp_path):
    commands = [[sys.executable, "-c", f"import time; print('started'); {then}"] for then in (first, "time.sleep(60)")]
    with pytest.raises(AssertionError, match=rf"(?s){words} processes had to be ended.*process 1"):
        watched(commands, [{}, {}], 1.5, tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.long  # two processes are held every day by test_in_two_processes, accelerate by test_engines.py
def test_accelerate_launch_runs_the_benchmark_on_two_processes(tmp_path):
    """The command of the guide, with fewer steps: the scores of one process, written once."""
    page = (guide.GUIDE / "training.md").read_text()
    assert "accelerate launch --multi_gpu --num_processes 2 -m benchmarks lora steps=20\n" in page
    options = "steps=2 batch=2 window=32 eval_windows=1".split()
    launch = f"--multi_gpu --num_processes 2 --main_process_port {free_port()} -m benchmarks lora".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *options, f"out={tmp_path / 'runs'}"]
    watched([command], [{"OMP_NUM_THREADS": "1"}], 180, tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lora.json", "lora.png"]
    record = json.loads((tmp_path / "runs" / "lora.json").read_text())
    assert record["environment"]["processes"] == 2

    from benchmarks.embedded.bench import parse
    from benchmarks.embedded.run import learning_rate, load_base, make_task, train

    settings, _, _ = parse(options, ll.get("lora"))
    model, tokenizer = load_base(settings)
    ll.attach(model, ll.config("lora", **learning_rate("lora", settings)))
    task = make_task(settings, tokenizer, 0)
    (wanted,) = train(model, ll.param_groups(model), task, settings, lambda steps, _: steps, "")
    (got,) = record["runs"][0]["curve"]
    assert got == pytest.approx(wanted, rel=1e-5)
