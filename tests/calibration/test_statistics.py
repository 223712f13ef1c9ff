"""Streamed statistics against sums over all activations at once, and every refusal by its message."""

import collections
import contextlib
import re

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.calibration.calls import full_precision
from lora_lite.calibration.enough import require_tokens
from lora_lite.calibration.measure import measure
from lora_lite.calibration.statistics import STATISTICS, Weights, parse
from lora_lite.testing import toy
from lora_lite.testing.checks import error

PATHS = ("blocks.0.q_proj", "blocks.0.down_proj", "blocks.1.o_proj", "blocks.1.up_proj")
EXACT = 1e-12  # float64 throughout


def layers(model, paths=PATHS):
    return {path: model.get_submodule(path) for path in paths}


def double_toy():
    return toy.toy().double()


def batches(count=4):
    return toy.batches(count=count, dtype=torch.float64)


def seen(model, path, data):
    """[(x (b, t, i), y - b (b, t, o), mask (b, t))] of every call, kept whole: what the library never does."""
    layer, found = model.get_submodule(path), []
    for batch in data:
        handle = layer.register_forward_hook(
            lambda layer, args, y, mask=batch["attention_mask"]: found.append((args[0], y, mask))
        )
        with torch.no_grad():
            model.eval()(batch["x"])
        handle.remove()
    b = 0 if layer.bias is None else layer.bias.detach()
    return [(x.double(), (y - b).double(), mask.bool()) for x, y, mask in found]


def dense(statistic, calls):
    """One sum over all tokens, by einsum; `calls` as (x (n, i), y - b (n, o)) of each call."""
    x, y = torch.cat([x for x, _ in calls]), torch.cat([y for _, y in calls])
    return {
        "n": lambda: torch.tensor([float(x.shape[0])]),
        "calls": lambda: torch.tensor([float(len(calls))]),
        "x_tr": lambda: torch.einsum("ni,ni->", x, x)[None],
        "x_abs": lambda: x.abs().sum(0),
        "x_sq": lambda: torch.einsum("ni,ni->i", x, x),
        "x_sum": lambda: torch.einsum("ni->i", x),
        "x_moment": lambda: torch.einsum("ni,nj->ij", x, x),
        "y_sum": lambda: torch.einsum("no->o", y),
        "y_sq": lambda: torch.einsum("no,no->o", y, y),
        "y_moment": lambda: torch.einsum("no,np->op", y, y),
        "yx_moment": lambda: torch.einsum("no,ni->oi", y, x),
    }[statistic]()


def unmasked(calls):
    return [(x[mask], y[mask]) for x, y, mask in calls]


def last_ones(calls):
    picked = []
    for x, y, mask in calls:
        ends = [(row, max(t for t in range(mask.shape[1]) if mask[row, t])) for row in range(len(mask)) if mask[row].any()]
        picked.append((torch.stack([x[at] for at in ends]), torch.stack([y[at] for at in ends])))
    return picked


def per_call(calls):
    return [(x / x.max().abs(), y / x.max().abs()) for x, y in unmasked(calls)]


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("position", "choose"), [("", unmasked), ("/last", last_ones), ("/call", per_call)])
def test_every_statistic_is_the_dense_sum_over_kept_tokens(position, choose, path):
    model, data = double_toy(), batches()
    wanted = [name + position for name in STATISTICS]
    got = measure(model, layers(model), wanted, data)
    assert set(got) == {*wanted, "weight"}
    for name in STATISTICS:
        assert got[name + position][path].dtype is torch.float64
        assert error(got[name + position][path], dense(name, choose(seen(model, path, data))).double()) < EXACT, name


def test_shapes_are_those_of_the_table():
    model = toy.one(24, 32)
    got = measure(model, {"o_proj": model.o_proj}, STATISTICS, toy.batches())
    sizes = {name: tuple(by_path["o_proj"].shape) for name, by_path in got.items() if name != "weight"}
    assert {n for n, shape in sizes.items() if shape == (1,)} == {"n", "calls", "x_tr"}
    assert {n for n, shape in sizes.items() if shape == (24,)} == {"x_abs", "x_sq", "x_sum"}
    assert {n: shape for n, shape in sizes.items() if n.endswith("moment")} == {
        "x_moment": (24, 24),
        "y_moment": (32, 32),
        "yx_moment": (32, 24),
    }
    assert sizes["y_sum"] == sizes["y_sq"] == (32,)


def test_moments_hold_without_bias_what_the_weight_makes_of_the_inputs():
    model = toy.one(24, 32, True, torch.float64)
    with torch.no_grad():
        model.o_proj.bias.add_(100)
    got = measure(model, {"o_proj": model.o_proj}, ("x_moment", "y_moment", "yx_moment"), batches())
    W, C = got["weight"]["o_proj"], got["x_moment"]["o_proj"]
    assert error(got["yx_moment"]["o_proj"], W @ C) < EXACT
    assert error(got["y_moment"]["o_proj"], W @ C @ W.T) < EXACT


def test_labels_divide_the_sums():
    model, data = double_toy(), batches()
    names = ("n", "y_sum", "y_sum:positive", "y_sum:negative", "y_sum/last:positive", "n/last:negative", "n/last")
    got = measure(model, layers(model), names, {"positive": data[:1], "negative": data[1:]})
    for path in PATHS:
        calls = seen(model, path, data)
        wanted = {
            "y_sum:positive": dense("y_sum", unmasked(calls[:1])),
            "y_sum:negative": dense("y_sum", unmasked(calls[1:])),
            "y_sum/last:positive": dense("y_sum", last_ones(calls[:1])),
            "n/last:negative": torch.tensor([12.0]),
            "n/last": torch.tensor([16.0]),
            "n": torch.tensor([4 * 42.0]),
            "y_sum": dense("y_sum", unmasked(calls)),
        }
        for name, value in wanted.items():
            assert error(got[name][path], value) < EXACT, name


def test_sums_do_not_depend_on_the_batching():
    model, data = double_toy(), batches()
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(4)]
    whole = [{k: torch.cat([batch[k] for batch in data]) for k in data[0]}]
    names = [n + p for n in STATISTICS if n != "calls" for p in ("", "/last")]
    results = [measure(model, layers(model), names, some) for some in (data, rows, whole)]
    for name in names:
        for path in PATHS:
            assert error(results[1][name][path], results[0][name][path]) < EXACT
            assert error(results[2][name][path], results[0][name][path]) < EXACT


def test_any_kind_of_batch_counts_alike():
    model, x = double_toy(), batches(1)[0]["x"]
    kinds = [
        {"x": x},
        collections.UserDict(x=x),
        collections.OrderedDict(x=x, attention_mask=torch.ones(4, 12)),
        {"x": x, "attention_mask": None},
        (x,),
        [x],
        x,
        x.reshape(2, 2, 12, 24),
        x.reshape(48, 24),
    ]
    wanted = measure(model, layers(model), STATISTICS, [kinds[0]])
    for batch in kinds[1:]:
        got = measure(model, layers(model), STATISTICS, iter([batch]))
        for name in STATISTICS:
            assert all(error(got[name][path], wanted[name][path]) < EXACT for path in PATHS), name


def test_values_that_are_no_tensors_reach_the_model():
    class Switch(toy.One):
        def forward(self, x, on):
            return self.o_proj(x if on else 0 * x)

    model = Switch(24, 32, True)
    for on, tokens in ((True, 1.0), (False, 0.0)):
        got = measure(model, {"o_proj": model.o_proj}, ["x_tr"], [{"x": torch.ones(1, 1, 24), "on": on}])
        assert got["x_tr"]["o_proj"] == 24 * tokens


def test_layers_called_twice_or_by_keyword_are_counted_at_every_call():
    class Twice(toy.One):
        def forward(self, x):
            return self.o_proj(input=x) + self.o_proj(2 * x)

    model = Twice(24, 32, True).double()
    got = measure(model, {"o_proj": model.o_proj}, ("n", "calls", "x_sum"), [torch.ones(2, 3, 24, dtype=torch.float64)] * 2)
    assert (got["n"]["o_proj"], got["calls"]["o_proj"]) == (24, 4)
    assert got["x_sum"]["o_proj"].tolist() == [36.0] * 24


def test_tied_layers_are_one_under_each_path():
    model = double_toy()
    got = measure(model, {"one": model.blocks[0].q_proj, "two": model.blocks[0].q_proj}, ["x_sq"], batches())
    assert torch.equal(got["x_sq"]["one"], got["x_sq"]["two"])


# --- masks ------------------------------------------------------------------------------------------------------------


def test_padding_has_no_influence_not_even_infinite_padding():
    model, sums = double_toy(), []
    names = [n + p for n in STATISTICS for p in ("", "/last", "/call")]
    for filler in (0.0, 1e30, float("inf"), float("nan")):
        data = batches()
        for batch in data:
            batch["x"][batch["attention_mask"] == 0] = filler
        sums.append(measure(model, layers(model), names, data))
    for other in sums[1:]:
        assert all(torch.equal(other[n][p], sums[0][n][p]) for n in names for p in PATHS)


def test_last_token_follows_the_mask_on_either_side():
    model = toy.one(24, 32, False, torch.float64)
    x = toy.inputs(3, 4, 24, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    got = measure(model, {"l": model.o_proj}, ("x_sum/last", "n/last", "n"), [{"x": x, "attention_mask": mask}])
    assert error(got["x_sum/last"]["l"], x[0, 3] + x[1, 1]) < EXACT
    assert (got["n/last"]["l"], got["n"]["l"]) == (2, 5)
    got = measure(model, {"l": model.o_proj}, ("x_sum/last", "n/last"), [x])
    assert error(got["x_sum/last"]["l"], x[:, 3].sum(0)) < EXACT


def test_mask_fits_layers_that_see_flattened_tokens():
    class Flat(toy.One):
        def forward(self, x, attention_mask=None):
            return self.o_proj(x.flatten(0, 1))

    model, data = Flat(24, 32, True).double(), batches()
    names = ("n", "x_sum", "x_sum/last")
    got = measure(model, {"l": model.o_proj}, names, data)
    calls = [(b["x"], b["x"], b["attention_mask"].bool()) for b in data]
    assert got["n"]["l"] == 4 * 42
    assert error(got["x_sum"]["l"], dense("x_sum", unmasked(calls))) < EXACT
    assert error(got["x_sum/last"]["l"], dense("x_sum", last_ones(calls))) < EXACT


def test_calls_without_a_kept_token_do_not_count():
    model = toy.one()
    full, empty = toy.batches(count=2)
    empty["attention_mask"] = torch.zeros(4, 12)
    got = measure(model, {"l": model.o_proj}, ("n", "calls", "x_tr/call", "y_moment/last"), [full, empty])
    alone = measure(model, {"l": model.o_proj}, ("n", "calls", "x_tr/call", "y_moment/last"), [full])
    assert got["calls"]["l"] == 1
    assert all(torch.equal(got[name]["l"], alone[name]["l"]) for name in alone if name != "weight")


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
def test_sums_are_precise_for_low_precision_activations(dtype, tolerance):
    """Against the float64 sums of the same, already rounded, activations."""
    model = toy.one(24, 32, False).to(dtype)
    data = toy.batches(count=50, dtype=dtype)
    got = measure(model, {"o_proj": model.o_proj}, STATISTICS, data)
    calls = unmasked(seen(model, "o_proj", data))
    for name in STATISTICS:
        assert error(got[name]["o_proj"], dense(name, calls)) < tolerance, name


def test_small_calls_are_not_lost_beside_a_large_one():
    model = toy.one()
    data = [torch.full((1, 24), 1e8), *[torch.ones(1, 24)] * 100]
    got = measure(model, {"o_proj": model.o_proj}, ["x_sum"], data)
    assert got["x_sum"]["o_proj"].tolist() == [1e8 + 100] * 24


def test_autocast_does_not_shorten_the_sums():
    model, data = toy.one(24, 32, False), toy.batches()
    exact = measure(model, {"o_proj": model.o_proj}, ("x_moment", "yx_moment"), data)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = measure(model, {"o_proj": model.o_proj}, ("x_moment", "yx_moment"), data)
    assert torch.equal(rounded["x_moment"]["o_proj"], exact["x_moment"]["o_proj"])
    assert 0 < error(rounded["yx_moment"]["o_proj"], exact["yx_moment"]["o_proj"]) < 1e-2


def test_shortened_float32_products_are_off_for_the_sums_and_come_back():
    matmul = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, setting)
    try:
        setattr(matmul, setting, "tf32" if isinstance(before, str) else True)
        with contextlib.suppress(KeyboardInterrupt), full_precision(torch.device("cpu")):
            assert getattr(matmul, setting) in ("ieee", False)
            raise KeyboardInterrupt
        assert getattr(matmul, setting) in ("tf32", True)
    finally:
        setattr(matmul, setting, before)


def test_weights_are_float32_copies_made_when_asked_for():
    model = toy.one().to(torch.bfloat16)
    weights = Weights({"o_proj": model.o_proj})
    assert list(weights) == ["o_proj"]
    assert len(weights) == 1
    assert weights["o_proj"].dtype is torch.float32
    weights["o_proj"].zero_()
    assert model.o_proj.weight.any()
    assert Weights({"o_proj": toy.one(dtype=torch.float64).o_proj})["o_proj"].dtype is torch.float64


# --- what is left behind ----------------------------------------------------------------------------------------------


class Noisy(toy.One):
    """Dropout before the layer; may fail on request."""

    def __init__(self):
        super().__init__(24, 32, True)
        self.quiet, self.loud = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x, fail=False):
        assert not torch.is_grad_enabled()
        if fail:
            raise KeyboardInterrupt
        return self.o_proj(self.quiet(self.loud(x)))


def test_the_model_is_measured_in_eval_mode_without_gradients_and_comes_back_as_it_was():
    model = Noisy().train()
    model.quiet.eval()
    x = toy.inputs(2, 5, 24)

    def surroundings():
        modes = [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return modes, hooks, [p.requires_grad for p in model.parameters()], torch.is_grad_enabled()

    before = surroundings()
    got = measure(model, {"l": model.o_proj}, ["x_tr"], [x])
    assert error(got["x_tr"]["l"], x.square().sum()[None]) < 1e-6
    assert surroundings() == before
    with pytest.raises(KeyboardInterrupt):
        measure(model, {"l": model.o_proj}, ["x_tr"], [{"x": x}, {"x": x, "fail": True}])
    assert surroundings() == before
    with pytest.raises(ll.LoraLiteError, match="not finite"):
        measure(model, {"l": model.o_proj}, ["x_tr"], [x / 0])
    assert surroundings() == before


def test_attached_adapters_are_silent_while_the_base_is_measured():
    model, data = toy.toy(), toy.batches()
    clean = measure(model, layers(model), ["y_moment"], data)
    toy.perturb(ll.attach(model, ll.config("lora", r=4), name="first"), 1.0)
    wanted, seen_here = [], []
    with ll.disabled(model):
        wanted.append(measure(model, layers(model), ["y_moment"], data))
    assert all(torch.equal(wanted[0]["y_moment"][p], clean["y_moment"][p]) for p in PATHS)
    handle = model.blocks[1].down_proj.register_forward_hook(lambda layer, args, y: seen_here.append(y))
    ll.attach(model, ll.config("corda", r=4), data, name="second")
    handle.remove()
    assert torch.equal(seen_here[0], toy.toy().blocks[1].down_proj(input_of(toy.toy(), "blocks.1.down_proj", data[0]["x"])))


def input_of(model, path, x):
    found = []
    model.get_submodule(path).register_forward_pre_hook(lambda layer, args: found.append(args[0]))
    model(x)
    return found[0]


# --- names and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("y_sum", ("y_sum", "", None, False)),
        ("y_sum/last:positive", ("y_sum", "last", "positive", False)),
        ("yx_moment/call:negative", ("yx_moment", "call", "negative", False)),
        ("x_sum/labels", ("x_sum", "labels", None, True)),
        ("x_sketch[8,64]/labels", ("x_sketch", "labels", None, True)),
        ("n", ("n", "", None, True)),
        ("wgrad", ("wgrad", "", None, False)),
    ],
)
def test_names_are_read_in_parts(name, parts):
    request = parse(name)
    assert (request.statistic, request.position, request.label, request.of_input) == parts


@pytest.mark.parametrize("name", [
        "y_summ", "y_sum/first", "y_sum:neutral", "y_sum:positive/last", "", "y_sum/last/call",
        "wgrad/last", "x_sketch", "x_sketch[8]", "y_sum[8,8]", "x_sketch[0.5,8]", "y_clip", "y_clip[2]", "y_clip[8,8]",
        "norm/last", "terms/labels",
    ],
)  # fmt: skip
def test_unknown_statistic_is_refused(name):
    with pytest.raises(ll.LoraLiteError, match=f"no statistic {re.escape(repr(name))}.*last.*call.*positive"):
        parse(name)


def test_unknown_statistic_suggests_the_closest():
    with pytest.raises(ll.LoraLiteError, match=r"Closest name: y_sum\."):
        parse("y_summ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"calibration_data is empty.*At least one batch"),
        (iter(()), r"calibration_data is empty"),
        ({"positive": [], "negative": []}, r"calibration_data\['positive'\] is empty"),
        (toy.inputs(2, 24), r"calibration_data is a Tensor.*An iterable of batches"),
        ({"x": toy.inputs(2, 24)}, r"calibration_data is a dict.*An iterable of batches"),
        (3, r"calibration_data is a int"),
        ({"positive": [toy.inputs(2, 24)]}, r"only positive batches.*both classes"),
        ({"negative": [toy.inputs(2, 24)]}, r"only negative batches"),
        ({"positive": toy.inputs(2, 24), "negative": []}, r"calibration_data\['positive'\] is a Tensor"),
        ([{"x": toy.inputs(2, 3, 24), "attention_mask": torch.zeros(2, 3)}], r"n is 0 at o_proj: every token is padding"),
        (
            [{"x": toy.inputs(2, 3, 24), "attention_mask": torch.ones(2, 4)}],
            r"o_proj sees activations of shape \(2, 3, 24\).*attention_mask of shape \(2, 4\)",
        ),
        ([toy.inputs(2, 24), toy.inputs(2, 24) / 0], r"o_proj has activations that are not finite"),
    ],
)
def test_data_that_cannot_be_measured_is_refused(data, message):
    model = toy.one()
    with pytest.raises(ll.LoraLiteError, match=message):
        measure(model, {"o_proj": model.o_proj}, ["n", "x_tr"], data)
    assert not model.o_proj._forward_hooks


def test_outputs_that_are_not_finite_are_refused():
    model = toy.one().to(torch.float16)
    with torch.no_grad():
        model.o_proj.weight.fill_(6e4)
    with pytest.raises(ll.LoraLiteError, match="o_proj has activations that are not finite"):
        measure(model, {"o_proj": model.o_proj}, ["x_tr"], [torch.ones(2, 24, dtype=torch.float16)])


def test_call_whose_largest_entry_is_zero_has_no_unit_and_is_refused():
    model = toy.one()
    x = -toy.inputs(2, 24).abs()
    x[0, 0] = 0
    with pytest.raises(ll.LoraLiteError, match="not finite"):
        measure(model, {"o_proj": model.o_proj}, ["x_tr/call"], [x])


def test_labelled_statistic_needs_labelled_data_of_both_classes_with_tokens():
    model = toy.one()
    with pytest.raises(ll.LoraLiteError, match=r"y_sum:positive needs labelled calibration data.*no labels"):
        measure(model, {"o_proj": model.o_proj}, ["y_sum:positive"], toy.batches())
    padding = {"x": toy.inputs(2, 3, 24), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ll.LoraLiteError, match="n:negative is 0 at o_proj"):
        measure(
            model, {"o_proj": model.o_proj}, ["n:positive", "n:negative"], {"positive": toy.batches(), "negative": [padding]}
        )


def test_layer_that_is_never_called_is_named():
    model = toy.toy()
    model.spare = nn.Linear(24, 24)
    with pytest.raises(ll.LoraLiteError, match=r"spare were never called.*\n.*exclude=\('spare',\)"):
        measure(model, layers(model) | {"spare": model.spare}, ["n"], toy.batches())


def test_too_few_tokens_are_refused_by_number():
    model = toy.one()
    got = measure(model, {"o_proj": model.o_proj}, ["n", "n/last"], [toy.inputs(2, 3, 24)])
    assert require_tokens(got, "o_proj", 6, "r directions") == 6
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 6 calibration tokens are too few. At least 7 for r directions"):
        require_tokens(got, "o_proj", 7, "r directions")
    with pytest.raises(ll.LoraLiteError, match="o_proj: 2 calibration"):
        require_tokens(got, "o_proj", 3, "r directions", name="n/last")


# --- one of two moments ---------------------------------------------------------------------------------------------------


class Sides(torch.nn.Module):
    """Wider, narrower and square layers on one input, then a narrower and a wider one on inputs of their own."""

    def __init__(self, first="up"):
        super().__init__()
        self.order = sorted(("up", "down", "square"), key=lambda name: name != first)
        for name, sizes in {"up": (24, 32), "down": (24, 16), "square": (24, 24), "alone": (72, 24), "last": (24, 30)}.items():
            self.add_module(name, torch.nn.Linear(*sizes))

    def forward(self, x, attention_mask=None):
        outputs = {name: getattr(self, name)(x) for name in self.order}
        return self.last(self.alone(torch.cat([outputs["up"], outputs["down"], outputs["square"]], dim=-1)))


@pytest.mark.parametrize("first", ["up", "down", "square"])
@pytest.mark.parametrize("second", ["y_moment", "yx_moment"])
def test_the_cheaper_moment_is_measured_and_held_once_per_input(second, first):
    model, name = toy.seeded(lambda: Sides(first)).double(), f"x_moment|{second}"
    paths = ("up", "down", "square", "alone", "last")
    of = {path: getattr(model, path) for path in paths}
    data = toy.batches(dtype=torch.float64)
    got = measure(model, of, (name, "x_moment", second), data)
    by_outputs = {"alone", *(("down",) if first == "down" else ())}
    for path in paths:
        assert error(got[name][path], got[second if path in by_outputs else "x_moment"][path]) < EXACT
    sharing = {"up", "square", "down"} - by_outputs
    assert len({id(got[name][path]) for path in sharing}) == 1
    assert len({id(moment) for moment in got[name].values()}) == (4 if first == "down" else 3)


def test_the_cheaper_moment_is_formed_once_per_input_and_batch(monkeypatch):
    from lora_lite.calibration import statistics as calibrate

    shapes, original = [], calibrate.STATISTICS["x_moment"]
    monkeypatch.setitem(calibrate.STATISTICS, "x_moment", lambda x, y: shapes.append(x.shape[1]) or original(x, y))
    model = toy.seeded(Sides)
    of = {path: getattr(model, path) for path in ("up", "down", "square", "alone", "last")}
    measure(model, of, ("x_moment|yx_moment",), toy.batches(count=3))
    assert shapes == [24, 24] * 3


# --- batches that do not run ----------------------------------------------------------------------------------------------


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.o_proj = torch.nn.Embedding(8, 24), torch.nn.Linear(24, 24)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.o_proj(x if attention_mask is None else x * attention_mask[:, :, None])


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ("hello", r", a str, does not run.*TypeError(.|\n)*model\(batch\)"),
        (None, r", a NoneType, does not run"),
        ({"input_ids": ["a"]}, r", \{'input_ids': list\}, does not run(.|\n)*model\(\*\*batch\)"),
        ({"words": IDS}, r"unexpected keyword argument 'words'"),
        ((IDS, IDS, IDS), r", \(\(2, 3\), \(2, 3\), \(2, 3\)\), does not run(.|\n)*model\(\*batch\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3, 3)}, r"'attention_mask': \(2, 3, 3\)\}, does not run"),
        ({"input_ids": IDS[0], "attention_mask": torch.ones(3)}, r"'input_ids': \(3,\).*IndexError"),
        ({"input_ids": IDS + 9}, r"IndexError: index out of range"),
        ({"input_ids": IDS, "attention_mask": IDS / 0}, r": attention_mask holds other numbers"),
    ],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_batch_that_does_not_run_is_named_with_its_shapes_and_the_cause(batch, told, labelled):
    model, data = Words(), [{"input_ids": IDS}, batch]
    place = r"calibration_data\['negative'\]\[1\]" if labelled else r"calibration_data\[1\]"
    with pytest.raises(ll.LoraLiteError, match=f"{place}.*{told}") as raised:
        measure(model, {"l": model.o_proj}, ["n"], {"positive": data[:1], "negative": data} if labelled else data)
    assert raised.value.__cause__ is not None or "does not run" not in told
    assert not model.o_proj._forward_hooks


def test_what_runs_out_of_memory_is_left_to_those_who_catch_it():
    class Large(Words):
        def forward(self, input_ids):
            raise torch.OutOfMemoryError

    model = Large()
    with pytest.raises(torch.OutOfMemoryError):
        measure(model, {"l": model.o_proj}, ["n"], [IDS])


@pytest.mark.parametrize("empty", [IDS[:0], {"input_ids": IDS[:, :0], "attention_mask": IDS[:, :0]}, (IDS[:0], IDS[:0])])
def test_batches_without_a_row_are_skipped_and_it_is_said_once(empty):
    class Strict(Words):
        def forward(self, input_ids, attention_mask=None):
            assert len(input_ids)
            return super().forward(input_ids, attention_mask)

    model = Strict()
    with pytest.warns(ll.LoraLiteWarning, match=r"skipped \(2\): calibration_data\[0\], calibration_data\[2\]") as said:
        got = measure(model, {"l": model.o_proj}, ["n", "calls"], [empty, IDS, empty, IDS])
    assert (got["n"]["l"], got["calls"]["l"], len(said)) == (12, 2, 1)
    with pytest.raises(ll.LoraLiteError, match=r"calibration_data is empty.*with a row"):
        measure(model, {"l": model.o_proj}, ["n"], [empty])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"pos": [IDS], "neg": [IDS]}, r"classes 'pos', 'neg'(.|\n)*\"positive\": data\['pos'\], \"negative\": data\['neg'\]"),
        (
            {"Negative": iter([IDS]), "Positive": [(IDS,)]},
            r"\"positive\": data\['Positive'\], \"negative\": data\['Negative'\]",
        ),
        ({"positive": [IDS], "neg": [{"input_ids": IDS}]}, r"classes 'positive', 'neg'"),
        ({"positive": [IDS], "negative": [IDS], "neutral": [IDS]}, r"classes 'positive', 'negative', 'neutral'"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, r"calibration_data is a dict"),
        ({"text": ["a", "b"], "label": [1, 2]}, r"calibration_data is a dict"),
        ({"input_ids": IDS, "attention_mask": IDS}, r"calibration_data is a dict"),
    ],
)
def test_classes_of_other_names_are_told_from_one_batch(data, told):
    model = Words()
    with pytest.raises(ll.LoraLiteError, match=told):
        measure(model, {"l": model.o_proj}, ["n"], data)
