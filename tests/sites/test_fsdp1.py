"""FSDP1, accelerate's default: pieces of tensors are refused by name, and the repair writes the whole adapter."""

import os
import textwrap
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel

import lora_lite as ll
from lora_lite.testing import toy


def process(rank, folder):
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29659")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    plain = toy.toy()
    toy.perturb(ll.attach(plain, ll.config("dora", r=4)))
    x = toy.inputs(2, 3, 24)
    want = plain(x).detach()
    model = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
    path, repair = f"{folder}/{rank}.safetensors", ""
    for call in (
        lambda: ll.merge(model),
        lambda: ll.snapshot(model),
        lambda: ll.export_peft(model, f"{folder}/peft"),
        lambda: ll.delta_weight(model, "blocks.0.q_proj"),
        lambda: ll.save(model, path),
    ):
        try:
            call()
        except ll.LoraLiteError as error:
            assert "sharded" in str(error)  # noqa: PT017  (in a process of its own)
            repair = textwrap.dedent(str(error).partition("\n")[2])
        else:
            raise AssertionError("pieces were taken for tensors")
    assert not os.path.exists(path)
    exec(repair, {"torch": torch, "ll": ll, "model": model, "path": path})
    fresh = toy.toy()
    ll.load(fresh, path)
    assert torch.equal(fresh(x), want)
    dist.destroy_process_group()


def test_pieces_are_refused_and_the_repair_saves_the_adapter_whole(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
