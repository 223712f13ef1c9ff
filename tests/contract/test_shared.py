"""Tensors that all layers of an attach share: one storage wherever the model goes, one copy or a hash in the file."""

import copy
import io
import os
import pickle
import struct
import sys
import weakref

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from lora_lite.cli.main import main
from lora_lite.contract import AdapterConfig, ParamSpec, dataclass, registry
from lora_lite.contract.adapter import Adapter
from lora_lite.contract.shared import draws
from lora_lite.contract.spec import kaiming, normal
from lora_lite.core import finding
from lora_lite.core.checkpoint import read
from lora_lite.core.fingerprint import digest
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.core.test_messages import refusal
from tests.oracles.files import entry, own, rewrite, rewrite_entry

R = 8
WHOLE = {"A": (R, 48), "B": (48, R)}  # the widest input and output of the toy


def attached(name="default", **options):
    """The toy with trained-looking vectors over a shared pair."""
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.VeRAConfig(r=R, **options), name=name))
    return model


def storages(model, name=None):
    """{tensor name: addresses of the memory that the layers see}."""
    found = [f.adapter for f in finding.adapters(model, name)]
    return {key: {getattr(a, key).untyped_storage().data_ptr() for a in found} for key in WHOLE}


def demand_one(model, name=None):
    """All layers see leading parts of one tensor per name, through the very holder that moves and saves it."""
    assert {len(seen) for seen in storages(model, name).values()} == {1}
    for f in finding.adapters(model, name):
        for key, shape in WHOLE.items():
            whole, view = f.adapter.shared[key].tensor, getattr(f.adapter, key)
            assert tuple(whole.shape) == shape
            assert (view.data_ptr(), view.stride()) == (whole.data_ptr(), whole.stride())
            assert whole.untyped_storage().nbytes() == whole.nbytes
            assert view.shape == ((R, f.adapter.d_in) if key == "A" else (f.adapter.d_out, R))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_a_file(model, tmp_path):
    ll.save(model, tmp_path / "a.safetensors")
    fresh = toy.toy()
    ll.load(fresh, tmp_path / "a.safetensors")
    return fresh


def demand_equal_files(first, second):
    (header, tensors), (other_header, others) = read(first), read(second)
    assert header == other_header
    assert tensors.keys() == others.keys()
    assert all(torch.equal(t, others[key]) and t.dtype is others[key].dtype for key, t in tensors.items())


def cloned_state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# --- one storage ------------------------------------------------------------------------------------------------------


def test_attach_allocates_each_tensor_once():
    demand_one(attached())
    layers = finding.adapters(attached())
    assert len(layers) == 8


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, through_torch_save, lambda m: pickle.loads(pickle.dumps(m)), None],
    ids=["deepcopy", "torch.save", "pickle", "file"],
)
def test_a_copy_shares_within_itself_and_not_with_the_original(copied, tmp_path):
    model, x = attached(), toy.inputs(3, 5, 24)
    wanted = model(x)
    twin = through_a_file(model, tmp_path) if copied is None else copied(model)
    demand_one(twin)
    assert torch.equal(twin(x), wanted)
    assert not storages(model)["A"] & storages(twin)["A"]
    finding.adapters(twin)[0].adapter.shared["A"].tensor.zero_()
    assert torch.equal(model(x), wanted)
    assert not torch.equal(twin(x), wanted)
    twin.double()
    demand_one(twin)
    demand_one(model)


def test_pickle_and_torch_save_hold_the_tensor_once():
    model = toy.toy()
    ll.attach(model, ll.VeRAConfig(r=2000))
    once = 4 * 2000 * (48 + 48)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert once < len(buffer.getvalue()) < 1.5 * once
    assert once < len(pickle.dumps(model)) < 1.5 * once


@pytest.mark.parametrize(
    "moved",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.share_memory(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: [block.double() for block in m.blocks],
        lambda m: [layer.double() for layer in m.modules() if isinstance(layer, nn.Linear)],
        lambda m: m.blocks[1].double() and m.double(),
    ],
    ids=["bfloat16", "double", "there and back", "shared memory", "empty", "meta", "by block", "by layer", "part, then all"],
)
def test_one_storage_stays_one_where_the_model_moves(moved):
    model = attached()
    moved(model)
    demand_one(model)


def test_a_cast_casts_the_one_tensor_and_a_block_alone_leaves_the_others_their_bits():
    model = attached()
    wholes = {key: finding.adapters(model)[0].adapter.shared[key].tensor for key in WHOLE}
    model.blocks[0].to(torch.bfloat16)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            dtype = torch.bfloat16 if "blocks.0" in path else torch.float32
            assert torch.equal(layer.default.A, wholes["A"][:, : layer.in_features].to(dtype))
    assert {len(seen) for seen in storages(model).values()} == {2}
    model.float()
    assert torch.equal(model.blocks[1].down_proj.default.A, wholes["A"])
    assert torch.equal(model.blocks[0].down_proj.default.A, wholes["A"].to(torch.bfloat16).float())


def test_blocks_that_take_turns_elsewhere_end_at_one_tensor():
    """As with offloading: one block at a time goes to another place and comes back."""
    model, x = attached(), toy.inputs(3, 5, 24)
    wanted, seen = model(x), storages(model)
    for _ in range(2):
        for block in model.blocks:
            block.double()
            block.float()
    demand_one(model)
    assert storages(model) == seen
    assert torch.equal(model(x), wanted)


def test_a_tensor_that_no_layer_uses_is_freed():
    model = attached()
    left = [weakref.ref(finding.adapters(model)[0].adapter.shared["A"].tensor)]
    for _ in range(3):  # the other block stays where it is
        model.blocks[0].to(torch.bfloat16)
        left.append(weakref.ref(model.blocks[0].q_proj.default.shared["A"].tensor))
        model.blocks[0].float()
    assert [tensor() is None for tensor in left] == [False, True, True, True]
    model.double()
    assert left[0]() is None


def test_a_model_in_two_places_is_copied_and_pickled_as_it_is():
    model, x = attached(), toy.inputs(3, 5, 24)
    model.blocks[1].double()
    for twin in (copy.deepcopy(model), through_torch_save(model), pickle.loads(pickle.dumps(model))):
        assert {len(seen) for seen in storages(twin).values()} == {2}
        assert torch.equal(twin.blocks[0](x), model.blocks[0](x))
        assert torch.equal(twin.blocks[1](x.double()), model.blocks[1](x.double()))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_leaves_the_shared_tensors_to_the_config(assign):
    """Files of other libraries hold no views of one tensor; what the config draws is there without them."""
    donor, model, x = attached(), toy.toy(), toy.inputs(3, 5, 24)
    ll.attach(model, ll.VeRAConfig(r=R))
    state = cloned_state(donor)
    assert not [key for key in state if key.endswith((".A", ".B"))]
    model.load_state_dict(state, assign=assign)
    demand_one(model)
    assert torch.equal(model(x), donor(x))
    model.double()
    demand_one(model)


def test_two_adapters_do_not_share_with_each_other():
    model, x = attached(name="one"), toy.inputs(3, 5, 24)
    alone = model(x)
    toy.perturb(ll.attach(model, ll.VeRAConfig(r=R), name="two"), seed=3)
    for name in ("one", "two"):
        demand_one(model, name)
    assert not storages(model, "one")["A"] & storages(model, "two")["A"]
    model.double()
    model.float()
    for name in ("one", "two"):
        demand_one(model, name)
    finding.adapters(model, "two")[0].adapter.shared["A"].tensor.zero_()
    ll.detach(model, "two")
    demand_one(model, "one")
    assert torch.equal(model(x), alone)


def test_loading_twice_gives_two_adapters_with_a_tensor_each(tmp_path):
    model = attached()
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(model, tmp_path / "a.safetensors", name="again")
    assert not storages(model, "default")["A"] & storages(model, "again")["A"]
    ll.detach(model, "default")
    demand_one(model)


def test_the_shared_pair_is_frozen_and_training_leaves_its_bits():
    model = attached()
    handle = finding.adapters(model)
    before = {key: handle[0].adapter.shared[key].tensor.clone() for key in WHOLE}
    trained = {id(p) for group in ll.param_groups(model) for p in group["params"]}
    assert not any(id(getattr(f.adapter, key)) in trained for f in handle for key in WHOLE)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.1, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(toy.inputs(3, 5, 24)).square().mean().backward()
        optimizer.step()
    for key in WHOLE:
        tensor = handle[0].adapter.shared[key].tensor
        assert not tensor.requires_grad
        assert torch.equal(tensor, before[key])
        assert tensor._version == 1  # written once, when it was filled


def test_merge_delta_weight_and_unmerge():
    model, x = attached(), toy.inputs(3, 5, 24)
    wanted, before = model(x), photograph(model)
    a = model.blocks[1].up_proj.default
    dense = a.lambda_b[:, None] * a.B @ (a.lambda_d[:, None] * a.A)
    assert torch.allclose(ll.delta_weight(model, "blocks.1.up_proj"), dense, atol=1e-6)
    ll.merge(model)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    demand_one(model)
    ll.unmerge(model)
    assert torch.equal(model(x), wanted)
    demand_same(model, before, "after merge and unmerge")


# --- counts and bytes -------------------------------------------------------------------------------------------------


def test_status_counts_a_shared_tensor_once_per_adapter():
    model = attached()
    assert [row.frozen for row in ll.status(model).layers] == [2 * R * 48] + 7 * [0]
    assert ll.status(copy.deepcopy(model)).frozen == 2 * R * 48
    ll.attach(model, ll.VeRAConfig(r=R, targets="o_proj"), name="two")
    assert ll.status(model).frozen == 2 * R * 48 + R * (32 + 24)
    model.blocks[0].double()  # a second tensor of the first adapter, and of the second
    assert ll.status(model).frozen == 2 * (2 * R * 48 + R * (32 + 24))


def content_bytes(path):
    """Size of the numbers in a safetensors file."""
    with open(path, "rb") as file:
        return os.path.getsize(path) - 8 - struct.unpack("<Q", file.read(8))[0]


@pytest.mark.parametrize(("save_shared", "pair"), [(True, 2 * R * 48), (False, 0)])
def test_file_holds_the_pair_once_or_not_at_all(tmp_path, save_shared, pair):
    path = tmp_path / "a.safetensors"
    ll.save(attached(save_shared=save_shared), path)
    vectors = 2 * (32 + 24 + 48 + 24) + 8 * R
    assert content_bytes(path) == 4 * (vectors + pair)
    assert {key for key in own(path) if key.startswith("*")} == ({"*.A", "*.B"} if save_shared else set())


def test_command_line_shows_the_shared_tensors_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.safetensors"
    ll.save(attached(), path)
    monkeypatch.setattr(sys, "argv", ["lora_lite", "inspect", str(path)])
    main()
    shown = capsys.readouterr().out
    assert "*.A  (8, 48)  float32" in shown
    assert "*.B  (48, 8)  float32" in shown
    assert "tensors    18 on 8 layers" in shown
    ll.save(attached(save_shared=False, seed=3), path)
    main()
    assert "*.A  drawn again from seed 3" in capsys.readouterr().out


# --- drawn again ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
    """(path, the model) of an adapter that leaves its pair out of the file."""
    model, path = attached(save_shared=False), tmp_path / "drawn.safetensors"
    ll.save(model, path)
    return path, model


def test_what_the_file_leaves_out_is_drawn_again_to_the_bit(drawn):
    path, model = drawn
    fresh, x = toy.toy(), toy.inputs(3, 5, 24)
    state = torch.random.get_rng_state()
    ll.load(fresh, path)
    assert torch.equal(state, torch.random.get_rng_state())
    demand_one(fresh)
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(fresh.blocks[0].q_proj.default.A, model.blocks[0].q_proj.default.A)
    values = draws({f.path: f.adapter for f in finding.adapters(model)}, 0)
    assert entry(path)["drawn"] == {key: digest(value) for key, value in values.items()}


def test_hash_of_other_numbers_is_refused(drawn):
    path, _ = drawn
    hashes = entry(path)["drawn"]
    rewrite_entry(path, drawn=hashes | {"B": hashes["A"]})
    refusal(lambda: ll.load(fresh, path), str(path), "B cannot be drawn again", "seed=0", model=(fresh := toy.toy()))


def test_another_seed_is_refused(drawn):
    path, _ = drawn
    rewrite_entry(path, config=entry(path)["config"] | {"seed": 1})
    refusal(lambda: ll.load(fresh, path), str(path), "A, B cannot be drawn again", "seed=1", model=(fresh := toy.toy()))


def test_another_generator_is_refused(drawn, monkeypatch):
    """As if another version of torch drew other numbers from the same seed."""
    path, _ = drawn
    fresh, plain = toy.toy(), torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, lo, hi: plain(t, lo, hi).mul_(0.5))
    refusal(lambda: ll.load(fresh, path), str(path), "A, B cannot be drawn again", model=fresh)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"lambda_b": "00" * 16}, "lambda_b cannot be drawn again"),
        ({"C": "00" * 16}, "C cannot be drawn again"),
        ({}, "missing *.A, missing *.B"),
        ([], "drawn of adapter 'default' is no dict"),
        ("{", "damaged header"),
    ],
)
def test_tampered_list_of_drawn_tensors(drawn, content, words):
    path, _ = drawn
    rewrite_entry(path, drawn=content)
    refusal(lambda: ll.load(fresh, path), str(path), words, model=(fresh := toy.toy()))


def test_drawn_and_stored_at_once_is_refused(drawn):
    path, _ = drawn
    rewrite(path, tensors=read(path)[1] | {"default/*.A": torch.zeros(R, 48)})
    refusal(lambda: ll.load(fresh, path), str(path), "unexpected *.A", model=(fresh := toy.toy()))


def test_a_model_cast_to_fewer_bits_and_back_stores_what_it_has(tmp_path):
    model = attached(save_shared=False).to(torch.bfloat16).float()
    path = tmp_path / "a.safetensors"
    with pytest.warns(ll.LoraLiteWarning, match="does not hold blocks.0.q_proj.weight"):  # the base was rounded as well
        ll.save(model, path)
    assert entry(path)["drawn"] == {}
    assert {"*.A", "*.B"} <= set(own(path))
    fresh, x = toy.toy().to(torch.bfloat16).float(), toy.inputs(3, 5, 24)
    ll.load(fresh, path)
    assert torch.equal(fresh(x), model(x))
    ll.save(fresh, tmp_path / "b.safetensors")
    demand_equal_files(path, tmp_path / "b.safetensors")


def test_a_model_in_fewer_bits_still_leaves_the_draw_out(tmp_path):
    """Rounding the draw is repeated at load; nothing is lost."""
    model = attached(save_shared=False).to(torch.bfloat16)
    path = tmp_path / "a.safetensors"
    ll.save(model, path)
    assert set(entry(path)["drawn"]) == {"A", "B"}
    fresh = toy.toy().to(torch.bfloat16)
    ll.load(fresh, path)
    assert torch.equal(fresh.blocks[0].q_proj.default.A, model.blocks[0].q_proj.default.A)


# --- strict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("*.A"), "missing *.A"),
        (lambda t: t.update({"*.C": torch.zeros(2)}), "unexpected *.C"),
        (lambda t: t.update({"blocks.0.q_proj.A": torch.zeros(R, 24)}), "unexpected blocks.0.q_proj.A"),
        (lambda t: t.update({"*.A": t["*.A"][:, :24].clone()}), "*.A has shape (8, 24), the config says (8, 48)"),
        (lambda t: t.update({"*.B": t["*.B"].int()}), "*.B is int32"),
        (lambda t: t.update({"*.B": t["*.B"] * float("nan")}), "*.B is not finite"),
    ],
)
def test_shared_tensors_are_read_strictly(tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    ll.save(attached(), path)
    tensors = own(path)
    change(tensors)
    rewrite(path, {f"default/{key}": tensor for key, tensor in tensors.items()})
    refusal(lambda: ll.load(fresh, path), str(path), words, model=(fresh := toy.toy()))


@pytest.mark.filterwarnings("ignore:.*does not hold")  # the base was rounded as well
def test_parts_of_a_view_that_differ_are_not_saved(tmp_path):
    """Not in silence: the file has room for one tensor."""
    model = attached()
    model.blocks[0].to(torch.bfloat16).float()
    refusal(lambda: ll.save(model, tmp_path / "a.safetensors"), "A of adapter 'default' differs between layers", model=model)
    model = attached()
    model.blocks[1].o_proj.default.B = torch.zeros(24, R)
    refusal(lambda: ll.save(model, tmp_path / "a.safetensors"), "B of adapter 'default' differs between layers", model=model)
    assert list(tmp_path.iterdir()) == []


def test_copies_that_another_library_put_in_the_place_of_views_are_saved(tmp_path):
    """Dispatchers replace buffers one by one; the numbers are the same."""
    model, x = attached(), toy.inputs(3, 5, 24)
    for f in finding.adapters(model):
        f.adapter._buffers["A"] = f.adapter.A.clone()
    assert torch.equal(through_a_file(model, tmp_path)(x), model(x))
    model.double()
    demand_one(model)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_shared", [True, False])
@pytest.mark.parametrize("low", ["blocks.0.q_proj", "blocks.1.o_proj", "blocks.1.down_proj"])
def test_layers_of_several_dtypes_share_and_come_back_to_the_bit(tmp_path, low, save_shared):
    def base():
        model = toy.toy()
        model.get_submodule(low).to(torch.bfloat16)
        return model

    model = base()
    layers = toy.perturb(ll.attach(model, ll.VeRAConfig(r=R, save_shared=save_shared))).layers
    assert {path for path, a in layers.items() if a.A.dtype is torch.bfloat16} == {low}
    assert {len(seen) for seen in storages(model).values()} == {2}
    wholes = draws(layers, 0)
    for path, a in layers.items():
        assert torch.equal(a.A, wholes["A"][:, : a.d_in].to(a.A.dtype)), path
        z = toy.inputs(3, a.d_in, dtype=a.A.dtype)
        assert model.get_submodule(path)(z).dtype is a.A.dtype
    ll.save(model, tmp_path / "a.safetensors")
    fresh = base()
    for path, a in ll.load(fresh, tmp_path / "a.safetensors").layers.items():
        for key, tensor in layers[path].state_dict().items():
            assert torch.equal(a.state_dict()[key], tensor), f"{path}.{key}"
    ll.save(fresh, tmp_path / "b.safetensors")
    demand_equal_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    demand_one(model.to(torch.bfloat16))


def test_half_precisions_that_do_not_contain_each_other(tmp_path):
    def base():
        model = toy.toy()
        model.blocks[0].half()
        model.blocks[1].to(torch.bfloat16)
        return model

    model = base()
    layers = ll.attach(model, ll.VeRAConfig(r=R)).layers
    ll.save(model, tmp_path / "a.safetensors")
    assert own(tmp_path / "a.safetensors")["*.A"].dtype is torch.float32
    for path, a in ll.load(base(), tmp_path / "a.safetensors").layers.items():
        assert torch.equal(a.A, layers[path].A)
        assert torch.equal(a.B, layers[path].B)


def test_buffer_dtype_holds_for_the_shared_pair():
    model = toy.toy()
    ll.attach(model, ll.VeRAConfig(r=R, buffer_dtype=torch.bfloat16))
    demand_one(model)
    assert model.blocks[0].q_proj.default.A.dtype is torch.bfloat16
    assert model.blocks[0].q_proj.default.lambda_b.dtype is torch.float32


# --- declaring, drawing, failing --------------------------------------------------------------------------------------


def variant(specs, forward=None):
    """A variant with these specs beside one trained vector, registered by `registry.borrowed`."""

    @dataclass(frozen=True, kw_only=True)
    class SharingConfig(AdapterConfig):
        pass

    class Sharing(Adapter):
        Config = SharingConfig
        variant = "sharing"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"g": ParamSpec((d_out,), identity=0, decay=True), **specs(d_in, d_out, cfg)}

        def forward(self, x, y, base):
            return y * (1 + self.coeff * self.g)

    return Sharing


FROZEN = {"trainable": False, "shared": True}


@pytest.mark.parametrize("fields", [{"shared": True}, {"saved": False}, {"saved": False, "trainable": False}])
def test_trained_or_unshared_tensors_are_refused_at_the_spec(fields):
    refusal(lambda: ParamSpec((2, 3), **fields), "cannot be built", "share frozen tensors only")


def test_start_is_given_the_whole_shape_once():
    seen = []

    def start(shape):
        seen.append(shape)
        return torch.randn(shape)

    def specs(d_in, d_out, cfg):
        return {"T": ParamSpec((cfg.r, d_in, d_out), start, **FROZEN), "v": ParamSpec((d_in,), start, **FROZEN)}

    with registry.borrowed(cls := variant(specs)):
        model = toy.toy().to(torch.bfloat16)
        layers = ll.attach(model, cls.Config(r=2, rank_pattern={"up_proj": 3})).layers
    assert seen == [(3, 48, 48), (48,)]
    wholes = draws(layers, 0)
    for a in layers.values():
        assert torch.equal(a.T, wholes["T"][: a.cfg.r, : a.d_in, : a.d_out].to(torch.bfloat16))
        assert torch.equal(a.v, wholes["v"][: a.d_in])  # a vector: in the adapter's dtype
    assert len({a.T.untyped_storage().data_ptr() for a in layers.values()}) == 1


def test_draw_depends_on_seed_and_name_and_not_on_the_layers():
    def specs(d_in, d_out, cfg):
        return {"A": ParamSpec((4, 16), normal(1.0), **FROZEN), "B": ParamSpec((4, 16), normal(1.0), **FROZEN)}

    def pair(**options):
        a = next(iter(ll.attach(toy.toy(), cls.Config(r=1, **options)).layers.values()))
        return a.A, a.B

    with registry.borrowed(cls := variant(specs)):
        state = torch.random.get_rng_state()
        A, B = pair()
        assert torch.equal(state, torch.random.get_rng_state())
        assert not torch.equal(A, B)
        assert torch.equal(pair(targets="down_proj")[0], A)
        assert not torch.equal(pair(seed=1)[0], A)


@pytest.mark.parametrize(
    "specs",
    [
        lambda i, o, cfg: {"A": ParamSpec((4, i), kaiming, **FROZEN)} if i > 24 else {},
        lambda i, o, cfg: {"A": ParamSpec((4, i), kaiming, **FROZEN)} if i == 24 else {},
        lambda i, o, cfg: {"A": ParamSpec((4, i), kaiming, trainable=False, shared=i == 24)},
        lambda i, o, cfg: {"A": ParamSpec((4, i) if i == 24 else (4,), kaiming, **FROZEN)},
        lambda i, o, cfg: {"A": ParamSpec((4, i), kaiming, **FROZEN, saved=i == 24)},
    ],
    ids=["only wide", "only narrow", "sometimes shared", "axes", "saved"],
)
def test_a_tensor_that_layers_declare_differently_is_refused(specs):
    with registry.borrowed(cls := variant(specs)):
        refusal(
            lambda: ll.attach(model, cls.Config(r=1)),
            "A is shared, and not declared alike",
            "blocks.",
            model=(model := toy.toy()),
        )


@pytest.mark.parametrize("fault", ["shape", "error", "nan"])
def test_a_start_that_fails_leaves_no_trace(fault):
    def start(shape):
        if fault == "error":
            raise RuntimeError("no numbers today")
        return torch.zeros(2, 2) if fault == "shape" else torch.full(shape, float("nan"))

    model = toy.toy()
    before, state = photograph(model), torch.random.get_rng_state()
    with registry.borrowed(cls := variant(lambda i, o, cfg: {"A": ParamSpec((4, i), start, **FROZEN)})):
        expected = RuntimeError if fault == "error" else ll.LoraLiteError
        with pytest.raises(expected, match={"shape": "start of A", "error": "today", "nan": "A is not finite"}[fault]):
            ll.attach(model, cls.Config(r=1))
    demand_same(model, before, "after a failed start")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_layer_on_the_meta_device_leaves_no_trace():
    model = toy.toy()
    model.blocks[1].down_proj.to("meta")
    before = [(key, id(t)) for key, t in model.state_dict(keep_vars=True).items()]
    refusal(lambda: ll.attach(model, ll.VeRAConfig(r=R)), "blocks.1.down_proj has no weights yet")
    assert [(key, id(t)) for key, t in model.state_dict(keep_vars=True).items()] == before
    assert not finding.adapters(model)


def test_a_variant_without_shared_tensors_writes_no_hashes(tmp_path):
    model = toy.toy()
    ll.attach(model, ll.config("lora", r=2))
    ll.save(model, tmp_path / "a.safetensors")
    with safetensors.safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        assert "drawn" not in file.metadata()
        assert not any(key.startswith("*") for key in file.keys())
