"""Streamed weight gradients against autograd's, the losses they come from, label masks, sketches and shared inputs."""

import contextlib
import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.calibration.losses import default_loss
from lora_lite.calibration.measure import measure
from lora_lite.calibration.statistics import parse, sketch_matrix
from lora_lite.families.principal import allotted, principal, required
from lora_lite.mathematics.spectrum import nystrom
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.calibration.test_statistics import EXACT, PATHS, batches, double_toy, layers

IDS = torch.arange(24).reshape(2, 12)
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[1, 8:] = 0


def scalar(model, batch):
    """A loss of the toy that every layer has a part in, padding without influence."""
    y, mask = model(batch["x"]), batch["attention_mask"].bool()
    return (y[mask] * torch.arange(24.0).cos().to(y)).tanh().sum()


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def autograd(model, paths, loss):
    """{path: dLoss/dW} as autograd forms it, the model in eval mode."""
    for p in model.parameters():
        p.requires_grad_(True)
    model.eval()
    weights = [model.get_submodule(path).weight for path in paths]
    return dict(zip(paths, torch.autograd.grad(loss(model), weights)))


def total(data, loss_fn):
    return lambda model: sum(loss_fn(model, batch) for batch in data)


@pytest.fixture
def qwen():
    """Qwen3 with random weights; no norm is 1 and no projection has a bias."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return toy.seeded(lambda: transformers.Qwen3ForCausalLM(config)).eval()


def projections(model):
    return ll.find_targets(model, ll.config("lora", exclude=("lm_head",)))


# --- equal to autograd's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_equals_that_of_autograd_and_leaves_flags_and_gradients_alone(frozen):
    model, data = double_toy(), batches()
    want = autograd(double_toy(), PATHS, total(data, scalar))
    marks = {}
    for index, (name, p) in enumerate(model.named_parameters()):
        p.requires_grad_(not frozen and index % 3 != 0)
        p.grad = marks[name] = torch.full_like(p, float(index))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    got = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    for path in PATHS:
        assert got[path].dtype is torch.float64
        assert error(got[path], want[path]) < EXACT
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, p in model.named_parameters():
        assert p.grad is marks[name]
        assert not (p.grad != p.grad.flatten()[0]).any()


@pytest.mark.parametrize("flag", [True, False])
def test_gradient_of_a_transformer_equals_that_of_autograd(qwen, flag):
    """All seven projections, labels with ignored positions, right padding; float32."""
    labels = IDS.masked_fill(PADDED == 0, -100)
    labels[0, :5] = -100
    batch = {"input_ids": IDS, "attention_mask": PADDED, "labels": labels}
    paths = list(projections(qwen))
    want = autograd(qwen, paths, lambda model: model(**batch).loss * int((labels[:, 1:] != -100).sum()))
    for p in qwen.parameters():
        p.requires_grad_(flag)
    got = measure(qwen, projections(qwen), ["wgrad"], [batch])["wgrad"]
    assert len(paths) == 14
    for path in paths:
        assert relative(got[path], want[path]) < 2e-6, path
    assert all(p.requires_grad is flag and p.grad is None for p in qwen.parameters())


def test_layers_after_the_first_do_not_change_what_the_first_receives():
    """Measured alone, beside others, or all together, in any order: the same bits for one batch."""
    model, data = double_toy(), batches(1)
    every = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    for path in PATHS:
        alone = measure(model, layers(model, [path]), ["wgrad"], data, scalar)["wgrad"]
        assert error(alone[path], every[path]) < EXACT
    back = measure(model, layers(model, PATHS[::-1]), ["wgrad"], data, scalar)["wgrad"]
    assert all(torch.equal(back[path], every[path]) for path in PATHS)


class Overwriting(nn.Module):
    """Writes into the outputs of its layers, and into the input between two of them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x, attention_mask=None):
        x = x.clone()
        q = self.q_proj(x)
        q.mul_(2)
        x.add_(1)
        k = self.k_proj(x)
        q += k
        k.zero_()
        y = self.o_proj(q)
        y[..., 0] = 0
        return y.add_(1)

    def written_out(self, x):
        """The same function without a write, which autograd needs where the weights require gradients."""
        y = self.o_proj(2 * self.q_proj(x) + self.k_proj(x + 1))
        return y * (torch.arange(24) > 0) + 1


@pytest.mark.parametrize("frozen", [True, False])
def test_outputs_and_inputs_that_the_model_writes_into_are_those_of_the_layer(frozen):
    model, data = toy.seeded(Overwriting).double(), batches()
    paths = ("q_proj", "k_proj", "o_proj")
    want = autograd(model, paths, lambda model: sum(scalar(model.written_out, batch) for batch in data))
    assert error(model(data[0]["x"]), model.written_out(data[0]["x"])) < EXACT
    for p in model.parameters():
        p.requires_grad_(not frozen)
    got = measure(model, layers(model, paths), ["wgrad", "x_sum"], data, scalar)
    for path in paths:
        assert error(got["wgrad"][path], want[path]) < EXACT
    tokens = torch.cat([batch["x"][batch["attention_mask"] == 1] for batch in data])
    assert error(got["x_sum"]["q_proj"], tokens.sum(0)) < EXACT
    assert error(got["x_sum"]["k_proj"], (tokens + 1).sum(0)) < EXACT
    assert got["x_sum"]["q_proj"] is not got["x_sum"]["k_proj"]


class Checkpointed(nn.Module):
    """Forgets and recomputes activations in eval mode too."""

    def __init__(self, reentrant):
        super().__init__()
        self.o_proj, self.q_proj, self.k_proj, self.reentrant = nn.Linear(24, 24), nn.Linear(24, 8), nn.Linear(24, 8), reentrant

    def block(self, x):
        return (self.q_proj(x) * self.k_proj(x)).tanh()

    def forward(self, x):
        x = self.o_proj(x)
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_that_checkpointing_repeats_count_once(reentrant):
    x, names = toy.inputs(2, 12, 24, dtype=torch.float64), ("n", "calls", "x_moment", "y_moment", "wgrad")
    sums = []
    for mode in (None, reentrant):
        model = toy.seeded(lambda mode=mode: Checkpointed(mode)).double()
        linears = {path: model.get_submodule(path) for path in ("o_proj", "q_proj", "k_proj")}
        sums.append(measure(model, linears, names, [x, x], lambda model, x: model(x).sum()))
    for name in names:
        for path in linears:
            assert torch.equal(sums[0][name][path], sums[1][name][path]), (name, path)


def test_gradient_of_a_bfloat16_model_is_the_float32_product_of_what_it_computes():
    """Against the product of the very x and d, kept whole; autograd's own is rounded to bfloat16."""
    model, data = toy.toy().to(torch.bfloat16), toy.batches(dtype=torch.bfloat16)
    path, kept = PATHS[1], []
    layer = model.get_submodule(path)

    def keep(layer, args, y):
        y.register_hook(lambda d: kept.append((args[0].detach().float(), d.float())))

    handle = layer.register_forward_hook(keep)
    want = autograd(model, [path], total(data, scalar))[path]
    handle.remove()
    product = sum(torch.einsum("bto,bti->oi", d, x) for x, d in kept)
    got = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"][path]
    assert relative(got, product) < 1e-6
    assert 1e-5 < relative(got, want) < 2e-2


def test_batches_add_up_and_labels_divide_them():
    model, data = double_toy(), batches()
    parts = [measure(model, layers(model), ["wgrad"], [batch], scalar)["wgrad"] for batch in data]
    whole = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    divided = measure(
        model,
        layers(model),
        ["wgrad", "wgrad:positive", "wgrad:negative"],
        {"positive": data[:1], "negative": data[1:]},
        scalar,
    )
    for path in PATHS:
        assert error(sum(part[path] for part in parts), whole[path]) < EXACT
        assert error(divided["wgrad"][path], whole[path]) < EXACT
        assert error(divided["wgrad:positive"][path], parts[0][path]) < EXACT
        assert error(divided["wgrad:negative"][path], whole[path] - parts[0][path]) < EXACT


def test_layer_that_is_called_twice_counts_both_calls():
    class Twice(toy.One):
        def forward(self, x):
            return self.o_proj(input=x) + self.o_proj(2 * x).tanh()

    model = toy.seeded(lambda: Twice(24, 32, True)).double()
    x = toy.inputs(2, 5, 24, dtype=torch.float64)
    want = autograd(model, ["o_proj"], lambda model: model(x).square().sum())["o_proj"]
    got = measure(model, {"o_proj": model.o_proj}, ["wgrad", "calls"], [x], lambda model, x: model(x).square().sum())
    assert error(got["wgrad"]["o_proj"], want) < EXACT
    assert got["calls"]["o_proj"] == 2


def test_layer_that_stores_its_weight_transposed_has_its_gradient_as_outputs_by_inputs():
    transformers = pytest.importorskip("transformers")
    model = toy.seeded(lambda: nn.Sequential(transformers.pytorch_utils.Conv1D(32, 24)))
    x = toy.inputs(2, 5, 24)
    want = autograd(model, ["0"], lambda model: model(x).square().sum())["0"]
    got = measure(model, {"0": model[0]}, ["wgrad"], [x], lambda model, x: model(x).square().sum())["wgrad"]["0"]
    assert relative(got, want.T) < 1e-6


def test_padding_has_no_influence_on_the_gradient():
    sums = []
    for filler in (0.0, 1e6):
        model, data = double_toy(), batches()
        for batch in data:
            batch["x"][batch["attention_mask"] == 0] = filler
        sums.append(measure(model, layers(model), ["wgrad"], data, lambda model, batch: model(batch["x"]).sin().sum())["wgrad"])
    assert all(torch.equal(sums[0][path], sums[1][path]) for path in PATHS)


def test_batches_that_require_gradients_get_none():
    model, data = double_toy(), batches(1)
    want = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    data[0]["x"].requires_grad_(True)
    got = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    assert data[0]["x"].grad is None
    assert all(torch.equal(got[path], want[path]) for path in PATHS)


def test_attached_adapters_are_silent_and_get_no_gradient():
    model, data = double_toy(), batches()
    want = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=4), name="first"), 1.0)
    with ll.disabled(model):
        got = measure(model, layers(model), ["wgrad"], data, scalar)["wgrad"]
    assert all(torch.equal(got[path], want[path]) for path in PATHS)
    assert all(p.requires_grad and p.grad is None for p in handle.parameters())


# --- losses -----------------------------------------------------------------------------------------------------------


def test_loss_of_the_model_comes_first(qwen):
    batch = {"input_ids": IDS, "attention_mask": PADDED, "labels": IDS.flip(1)}
    assert torch.equal(default_loss(qwen, batch), qwen(**batch).loss)
    mapping = SimpleNamespace(loss=torch.tensor(3.0), logits=None)
    assert default_loss(lambda **batch: mapping, {}) is mapping.loss
    assert default_loss(lambda **batch: {"loss": mapping.loss}, {}) is mapping.loss


def test_loss_of_logits_is_the_cross_entropy_of_the_next_token_without_padding(qwen):
    right = {"input_ids": IDS, "attention_mask": PADDED}
    log = qwen(**right).logits.log_softmax(-1)
    terms = [-log[b, t, IDS[b, t + 1]] for b, length in enumerate((12, 8)) for t in range(length - 1)]
    assert relative(default_loss(qwen, right), torch.stack(terms).mean()) < 1e-6
    whole = {"input_ids": IDS}
    log = qwen(**whole).logits.log_softmax(-1)
    terms = [-log[b, t, IDS[b, t + 1]] for b in range(2) for t in range(11)]
    assert relative(default_loss(qwen, whole), torch.stack(terms).mean()) < 1e-6
    labels = IDS.masked_fill(PADDED == 0, -100)
    assert relative(default_loss(qwen, right), qwen(**right, labels=labels).loss) < 1e-6


def test_padding_on_the_left_predicts_nothing(qwen):
    """No logit at a padded position counts, so the gradient is that of autograd and the padding's ids do not matter."""
    left, paths, got = PADDED.flip(1), list(projections(qwen)), []
    for filler in (0, 63):
        batch = {"input_ids": IDS.masked_fill(left == 0, filler), "attention_mask": left}
        got.append(measure(qwen, projections(qwen), ["wgrad"], [batch])["wgrad"])
    want = autograd(qwen, paths, lambda model: default_loss(model, batch) * (11 + 7))
    for path in paths:
        assert relative(got[0][path], got[1][path]) < 1e-6
        assert relative(got[1][path], want[path]) < 2e-6


def test_labels_behind_padding_on_the_left_count_as_if_padding_predicted_nothing(qwen):
    """The model's own loss also asks the last padded position for the first token; G is the gradient without that term."""
    left, paths = PADDED.flip(1), list(projections(qwen))
    labels = IDS.masked_fill(left == 0, -100)
    batch = {"input_ids": IDS, "attention_mask": left, "labels": labels}
    got = measure(qwen, projections(qwen), ["wgrad"], [batch])["wgrad"]
    first = labels.clone()
    first[1, 4] = -100
    terms = [int((t[:, 1:] != -100).sum()) for t in (first, labels)]
    assert terms == [18, 19]
    want = autograd(qwen, paths, lambda model: model(**{**batch, "labels": first}).loss * terms[0])
    whole = autograd(qwen, paths, lambda model: model(**batch).loss * terms[1])
    for path in paths:
        assert relative(got[path], want[path]) < 2e-6, path
    assert max(relative(got[path], whole[path]) for path in paths) > 0.02


def test_tensor_without_a_loss_is_probed_by_fixed_random_signs_with_a_warning():
    model, data = double_toy(), batches(2)
    state = torch.random.get_rng_state()
    with pytest.warns(ll.LoraLiteWarning, match=r"gives no loss.*random combination of outputs.*loss_fn"):
        got = measure(model, layers(model), ["wgrad"], data)["wgrad"]
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.warns(ll.LoraLiteWarning):
        losses = [default_loss(model, batch).detach() for batch in data]
    picked = []
    for position in ((0, 0), (7, 3)):
        y = model(data[0]["x"]).detach()
        moved = y.clone()
        moved[(1, *position)] += 1
        with pytest.warns(ll.LoraLiteWarning):
            picked.append(float(default_loss(lambda x, attention_mask, y=moved: y, data[0]) - losses[0]))
    assert all(abs(abs(sign) - 1) < 1e-9 for sign in picked), "signs are 1 and -1"
    y = model(data[0]["x"]).detach()
    for row, moves in ((1, True), (0, False)):  # every second row ends in padding
        moved = y.clone()
        moved[row, -1, 3] += 7
        with pytest.warns(ll.LoraLiteWarning):
            assert bool((default_loss(lambda x, attention_mask, y=moved: y, data[0]) - losses[0]).abs() > 1e-9) is moves

    def again(model, batch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return default_loss(model, batch)

    want = autograd(double_toy(), PATHS, total(data, again))
    assert all(error(got[path], want[path]) < EXACT for path in PATHS)


def test_probe_of_half_precision_outputs_does_not_overflow():
    batch = torch.full((400, 24), 1e4, dtype=torch.float16)
    with pytest.warns(ll.LoraLiteWarning):
        loss = default_loss(lambda x: x, batch)
    assert loss.dtype is torch.float32
    assert loss.isfinite()


def test_own_loss_function_is_given_the_model_and_the_batch_in_eval_mode():
    model, data, seen = toy.toy().train(), toy.batches(count=2), []

    def loss_fn(given, batch):
        seen.append((given is model, given.training, torch.is_grad_enabled(), set(batch)))
        return scalar(given, batch)

    with torch.no_grad():
        handle = ll.attach(model, ll.config("lora_ga", r=4, loss_fn=loss_fn), data)
    assert seen == [(True, False, True, {"x", "attention_mask"})] * 2
    assert handle.config.loss_fn is None  # a model that carries it could not be pickled
    assert handle.config == ll.config("lora_ga", r=4)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: torch.ones((), requires_grad=True) * 2, r"q_proj.* had no part in the loss"),
        (lambda model, batch: torch.ones(()), r"loss of the calibration data is tensor\(1\.\).*depends on the adapted"),
        (lambda model, batch: model(batch["x"]), r"(?s)loss of the calibration data is tensor.*One finite number"),
        (lambda model, batch: model(batch["x"]).sum() / 0, r"loss of the calibration data is .*inf"),
        (lambda model, batch: model(batch["x"]).sum() * float("nan"), r"loss of the calibration data is .*nan"),
        (lambda model, batch: 3.0, r"loss of the calibration data is 3\.0"),
        (lambda model, batch: model(batch["x"]).sum().detach(), r"depends on the adapted layers.*\n.*outside torch.no_grad"),
        (lambda model, batch: 0 * model(batch["x"]).sum(), r"q_proj.* had no part in the loss"),
        (lambda model, batch: model.blocks[0](batch["x"]).sum(), r"^blocks\.1\.o_proj, blocks\.1\.up_proj had no part in the"),
    ],
)
def test_loss_that_gives_no_gradient_is_refused(loss_fn, message):
    model = toy.toy().train()
    before = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ll.LoraLiteError, match=message):
        measure(model, layers(model), ["wgrad"], toy.batches(), loss_fn)
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_gradients_that_are_not_finite_are_refused_by_the_layer():
    model = toy.one()
    x = toy.inputs(2, 3, 24)

    def loss_fn(model, x):
        return model(x).square().sum().clamp(max=1e9).sqrt() + (0 * model(x)[0, 0, 0]).sqrt()

    with pytest.raises(ll.LoraLiteError, match=r"o_proj has gradients that are not finite.*A finite loss"):
        measure(model, {"o_proj": model.o_proj}, ["wgrad"], [x], loss_fn)
    assert not model.o_proj._forward_hooks


def test_output_without_a_loss_or_tensor_is_refused():
    class Pair(toy.One):
        def forward(self, x):
            return self.o_proj(x), x

    model = Pair(24, 32, True)
    with pytest.raises(ll.LoraLiteError, match=r"Pair returns tuple without a loss.*\n.*loss_fn=lambda model, batch"):
        measure(model, {"o_proj": model.o_proj}, ["wgrad"], [toy.inputs(2, 24)])


def test_interruption_in_the_loss_restores_the_model():
    model = toy.toy().train()
    model.blocks[0].eval()
    model.blocks[1].q_proj.weight.requires_grad_(False)

    def surroundings():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()]

    before = surroundings()

    def loss_fn(model, batch):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        loss = scalar(model, batch)
        raise KeyboardInterrupt(loss)

    with contextlib.suppress(KeyboardInterrupt), torch.no_grad():
        measure(model, layers(model), ["wgrad"], toy.batches(), loss_fn)
    assert surroundings() == before
    assert torch.is_grad_enabled()


def test_loss_function_stays_out_of_the_file_and_of_equality():
    cfg = ll.config("lora_ga", loss_fn=scalar)
    assert cfg == ll.config("lora_ga")
    assert type(cfg).from_json(cfg.to_json()).loss_fn is None
    assert dataclasses.replace(cfg, r=4).loss_fn is scalar
    with pytest.raises(ll.LoraLiteError, match=r"loss_fn='mse'.*Callable"):
        ll.config("lora_ga", loss_fn="mse")


# --- shared inputs ----------------------------------------------------------------------------------------------------


def test_projections_of_one_tensor_hold_one_sum(qwen):
    names = ("n", "x_sum", "x_moment", "y_sum", "x_sketch[8,16]/labels")
    got = measure(qwen, projections(qwen), names, [{"input_ids": IDS, "labels": IDS}] * 2)
    for block in ("model.layers.0", "model.layers.1"):
        for first, *others in (
            (f"{block}.self_attn.q_proj", f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj"),
            (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
        ):
            for other in others:
                for name in names:
                    assert (got[name][first] is got[name][other]) is (name != "y_sum"), name
    distinct = {id(moment) for moment in got["x_moment"].values()}
    assert len(distinct) == 8
    alone = f"{block}.self_attn.v_proj"
    single = measure(qwen, {alone: qwen.get_submodule(alone)}, names, [{"input_ids": IDS, "labels": IDS}] * 2)
    assert all(torch.equal(single[name][alone], got[name][alone]) for name in names)


class Pair(nn.Module):
    """Two layers that share an input unless told otherwise; `again`: how often the first is called beside that."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 32), nn.Linear(24, 32)

    def forward(self, x, together=True, again=0):
        y = self.q_proj(x) + self.k_proj(x if together else x + 0)
        for _ in range(again):
            y = y + self.q_proj(2 * x)
        return y


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_layer_that_shares_its_input_on_one_call_only_is_refused(order):
    model = Pair()
    data = [{"x": toy.inputs(2, 24), "together": together} for together in order]
    with pytest.raises(
        ll.LoraLiteError, match=r"k_proj shares its input with q_proj on one call and not.*\n.*exclude=\(\"k_proj"
    ):
        measure(model, layers(model, ("q_proj", "k_proj")), ["n", "x_sum"], data)


@pytest.mark.parametrize("again", [1, 2])
def test_layer_whose_companion_is_called_more_often_is_refused(again):
    """Its sum would hold inputs that it never saw."""
    model = Pair()
    with pytest.raises(ll.LoraLiteError, match="k_proj shares its input with q_proj on one call and not on another"):
        measure(model, layers(model, ("q_proj", "k_proj")), ["n", "x_sum"], [{"x": toy.inputs(2, 24), "again": again}])


def test_inputs_that_were_written_to_or_copied_are_others():
    model = toy.seeded(Pair)
    got = measure(model, layers(model, ("q_proj", "k_proj")), ["x_sum"], [{"x": toy.inputs(2, 24), "together": False}] * 2)
    assert got["x_sum"]["q_proj"] is not got["x_sum"]["k_proj"]
    assert torch.equal(got["x_sum"]["q_proj"], got["x_sum"]["k_proj"])


# --- label masks ------------------------------------------------------------------------------------------------------


class WithLabels(toy.One):
    def forward(self, x, attention_mask=None, labels=None):
        return self.o_proj(x)


def test_labels_of_minus_one_hundred_drop_tokens_beside_the_padding():
    model, x = WithLabels(24, 32, True).double(), toy.inputs(2, 12, 24, dtype=torch.float64)
    labels = torch.zeros(2, 12, dtype=torch.long)
    labels[:, :5] = -100
    names = ("n", "n/labels", "x_sum/labels", "x_moment/labels", "y_sum/labels", "x_tr/labels", "calls/labels")
    layer = {"o_proj": model.o_proj}
    for mask in (PADDED, None):
        kept = (labels != -100) if mask is None else (labels != -100) & mask.bool()
        got = measure(model, layer, names, [{"x": x, "attention_mask": mask, "labels": labels}])
        assert got["n"]["o_proj"] == (24 if mask is None else 20)
        assert got["n/labels"]["o_proj"] == kept.sum() == (14 if mask is None else 10)
        tokens = x[kept]
        assert error(got["x_sum/labels"]["o_proj"], tokens.sum(0)) < EXACT
        assert error(got["x_moment/labels"]["o_proj"], tokens.T @ tokens) < EXACT
        assert error(got["y_sum/labels"]["o_proj"], (tokens @ model.o_proj.weight.T).sum(0)) < EXACT
        assert error(got["x_tr/labels"]["o_proj"], tokens.square().sum()[None]) < EXACT


def test_without_labels_the_position_is_that_of_the_attention_mask():
    model, data = double_toy(), batches()
    got = measure(model, layers(model), ("x_moment", "x_moment/labels", "n", "n/labels"), data)
    for path in PATHS:
        assert torch.equal(got["x_moment"][path], got["x_moment/labels"][path])
        assert torch.equal(got["n"][path], got["n/labels"][path])


def test_labels_that_do_not_fit_or_leave_nothing_are_refused():
    model, x = WithLabels(24, 32, True), toy.inputs(2, 12, 24)
    layer = {"o_proj": model.o_proj}
    with pytest.raises(ll.LoraLiteError, match=r"o_proj sees activations of shape \(2, 12, 24\).*labels of shape \(2, 11\)"):
        measure(model, layer, ["n/labels"], [{"x": x, "labels": torch.zeros(2, 11, dtype=torch.long)}])
    with pytest.raises(ll.LoraLiteError, match=r"n/labels is 0 at o_proj.*label -100"):
        measure(model, layer, ["n/labels"], [{"x": x, "labels": torch.full((2, 12), -100)}])
    measure(model, layer, ["n"], [{"x": x, "labels": torch.zeros(2, 11)}])


@pytest.mark.parametrize("samples", [2, 12], ids=["fewer than tokens", "as many as tokens"])
def test_labels_of_samples_drop_no_tokens(samples):
    """A classifier's batch: one label per row. As many rows as tokens must not be taken for labels of the tokens."""
    model, x = WithLabels(24, 32, True).double(), toy.inputs(samples, 12, 24, dtype=torch.float64)
    mask, labels = PADDED[1:].repeat(samples, 1), torch.arange(samples)
    batch, layer = {"x": x, "attention_mask": mask, "labels": labels}, {"o_proj": model.o_proj}
    got = measure(model, layer, ["n", "x_sum", "wgrad"], [batch], lambda model, batch: model(**batch).square().sum())
    assert got["n"]["o_proj"] == 8 * samples
    assert error(got["x_sum"]["o_proj"], x[:, :8].sum((0, 1))) < EXACT
    assert measure(model, layer, ["n/labels"], [batch])["n/labels"]["o_proj"] == 8 * samples


def test_labels_of_the_tokens_in_another_shape_meet_the_padding():
    model, x = WithLabels(24, 32, True).double(), toy.inputs(2, 12, 24, dtype=torch.float64)
    labels = torch.where(torch.arange(24) < 3, -100, 0)
    batch = {"x": x, "attention_mask": PADDED, "labels": labels}
    assert measure(model, {"o_proj": model.o_proj}, ["n/labels"], [batch])["n/labels"]["o_proj"] == 24 - 3 - 4


# --- sketches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "whole", "wide"), [(8, 16, True), (8, 24, False), (24, 0, False), (40, 0, False), (23, 23, True)]
)
def test_sketch_is_the_moment_times_a_fixed_orthonormal_matrix(q, whole, wide):
    model, data = double_toy(), batches()
    name = f"x_sketch[{q},{whole}]"
    got = measure(model, layers(model, PATHS[:1]), (name, "x_moment", f"{name}/labels"), data)
    sketch, moment = got[name][PATHS[0]], got["x_moment"][PATHS[0]]
    Omega = sketch_matrix(24, q, whole).double()
    assert sketch.shape == (24, q if wide else 24)
    assert error(Omega.T @ Omega, torch.eye(sketch.shape[1])) < 1e-6
    assert error(sketch, moment @ Omega) < 1e-6
    assert torch.equal(sketch, moment) is not wide
    assert torch.equal(sketch, got[f"{name}/labels"][PATHS[0]])


def test_sketch_matrix_is_the_same_whatever_the_seed_and_the_default_device():
    first = sketch_matrix(30, 4, 0).clone()
    sketch_matrix.cache_clear()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        second = sketch_matrix(30, 4, 0)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, sketch_matrix(30, 5, 0)[:, :4])
    assert parse("x_sketch[4,0]").of_input


def covariance(values, seed=3):
    """Symmetric, with these eigenvalues."""
    Q = torch.linalg.qr(toy.inputs(len(values), len(values), dtype=torch.float64, seed=seed)).Q
    return Q * values @ Q.T


K = torch.arange(1, 257, dtype=torch.float64)


@pytest.mark.parametrize("rank", [5, 8])
def test_nystrom_is_exact_where_the_rank_is_at_most_that_of_the_sketch(rank):
    values = torch.where(K[:64] <= rank, 1 / K[:64], 0.0)
    C, Omega = covariance(values), sketch_matrix(64, 8, 0).double()
    V, found = nystrom(C @ Omega, Omega)
    assert V.shape == (64, 8)
    assert error(V.T @ V, torch.eye(8)) < 1e-12
    assert error(found, values[:8]) < 1e-6
    assert error(V * found @ V.T, C) < 1e-6


def test_nystrom_never_exceeds_the_matrix_and_descends():
    C, Omega = covariance(1 / K), sketch_matrix(256, 32, 0).double()
    V, found = nystrom(C @ Omega, Omega)
    assert (found.diff() <= 0).all()
    assert torch.linalg.eigvalsh(C - V * found @ V.T).min() > -1e-6
    assert (found <= 1 / K[:32] + 1e-6).all()
    assert error(nystrom(1e6 * C @ Omega, Omega)[1], 1e6 * found) < 1e-9
    core = Omega.T @ C @ Omega
    assert error(V * found @ V.T, C @ Omega @ torch.linalg.solve(core, Omega.T @ C)) < 1e-4


@pytest.mark.parametrize(("power", "twice", "four"), [(1, 0.93, 0.97), (2, 0.998, 0.9998)])
def test_one_pass_captures_nearly_the_best_variance(power, twice, four):
    """Leading r = 16 of 256 directions, variances as k^-power, q = 2r and 4r, the mean of three bases."""
    shares = {}
    for q in (32, 64):
        Omega = sketch_matrix(256, q, 0).double()
        kept = []
        for seed in (3, 4, 5):
            C = covariance(K**-power, seed)
            V, _ = nystrom(C @ Omega, Omega)
            kept.append(float((V[:, :16].T @ C @ V[:, :16]).trace() / (K**-power)[:16].sum()))
        shares[q] = sum(kept) / 3
    assert twice < shares[32] < shares[64] < 1
    assert shares[64] > four


def test_nystrom_bears_rounding_and_zeros():
    C, Omega = covariance(K[:64] ** -2), sketch_matrix(64, 16, 0).double()
    noise = 1e-6 * toy.inputs(64, 16, dtype=torch.float64)  # ten times the shift: the core is not positive definite
    V, found = nystrom(covariance(torch.where(K[:64] <= 4, 1.0, 0.0)) @ Omega + noise, Omega)
    assert error(found[:4], torch.ones(4)) < 1e-4
    assert found[4:].max() < 1e-3
    V, found = nystrom(0 * C @ Omega, Omega)
    assert error(V.T @ V, torch.eye(16)) < 1e-12
    assert not found.any()


def streamed(X, most, whole):
    model = toy.one(X.shape[1], 32, dtype=X.dtype)
    names = required(most, whole)
    return names, measure(model, {"l": model.o_proj}, names, list(X.split(50)))


@pytest.mark.parametrize("center", [True, False])
def test_principal_directions_are_those_of_all_tokens_at_once(center):
    X = toy.inputs(200, 24, dtype=torch.float64) * torch.linspace(0.2, 3, 24) + 1.5
    names, stats = streamed(X, 6, 24)
    V, shares = principal(names, stats, "l", 6, center)
    Z = X - X.mean(0) if center else X
    _, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    assert error(shares, S[:6].square() / S.square().sum()) < 1e-12
    signs = (V.T * Vh[:6]).sum(1).sign()
    assert error(V.T * signs[:, None], Vh[:6]) < 1e-10


@pytest.mark.parametrize("center", [True, False])
def test_principal_directions_of_a_sketch_come_near(center):
    X = toy.inputs(400, 200, dtype=torch.float64) * (torch.arange(1, 201) ** -1.0) + 0.5
    names, stats = streamed(X, 8, 0)
    assert stats[names[3]]["l"].shape == (200, 32)
    V, shares = principal(names, stats, "l", 8, center)
    Z = X - X.mean(0) if center else X
    best = torch.linalg.svdvals(Z).square()
    kept = (Z @ V).square().sum(0)
    assert error(V.T @ V, torch.eye(8)) < 1e-10
    assert 0.999 < kept.sum() / best[:8].sum() <= 1
    assert 0.98 < shares.sum() / (kept.sum() / best.sum()) <= 1


def test_what_shares_an_input_is_decomposed_once(monkeypatch):
    import lora_lite.families.principal as module

    calls, original = [], module.top_eigenvectors
    monkeypatch.setattr(module, "top_eigenvectors", lambda C, k: calls.append(k) or original(C, k))
    model = toy.seeded(Pair)
    names = required(4, 24)
    stats = measure(model, layers(model, ("q_proj", "k_proj")), names, [{"x": toy.inputs(50, 24)}])
    for path in ("q_proj", "k_proj", "q_proj"):
        assert principal(names, stats, path, 4)[0].shape == (24, 4)
    assert principal(names, stats, "k_proj", 2)[0].shape == (24, 2)
    assert calls == [4]


def test_too_few_tokens_for_the_directions_are_refused():
    names, stats = streamed(toy.inputs(5, 24), 6, 24)
    with pytest.raises(ll.LoraLiteError, match=r"l: 5 calibration tokens are too few. At least 6 for 6 principal directions"):
        principal(names, stats, "l", 6)


def test_constant_inputs_explain_nothing():
    for x in (torch.ones(50, 24) * 100, torch.zeros(50, 24)):
        names, stats = streamed(x, 4, 24)
        V, shares = principal(names, stats, "l", 4)
        assert error(V.T @ V, torch.eye(4)) < 1e-12
        assert shares.max() < 0.1


def test_names_of_the_sums_carry_width_and_position():
    assert required(2.5, 100) == ("n", "x_tr", "x_sum", "x_sketch[12,100]")
    assert required(4, 0, labels=True) == ("n/labels", "x_tr/labels", "x_sum/labels", "x_sketch[16,0]/labels")


def test_shares_are_allotted_largest_first_then_leading_then_in_order():
    shares = {"a": [0.5, 0.2, 0.1], "b": [0.5, 0.2, 0.2], "c": [0.05, 0.01, 0.0]}
    tensors = {path: torch.tensor(q) for path, q in shares.items()}
    wanted = {0: (0, 0, 0), 1: (1, 0, 0), 2: (1, 1, 0), 3: (2, 1, 0), 4: (2, 2, 0), 5: (2, 3, 0), 6: (3, 3, 0), 9: (3, 3, 3)}
    for total_, ranks in wanted.items():
        assert tuple(allotted(tensors, total_).values()) == ranks


# --- rank 0 -----------------------------------------------------------------------------------------------------------


def test_rank_zero_leaves_the_layer_out_of_targets_adapters_and_file(tmp_path):
    cfg = ll.config("lora", r=4, targets=("q_proj", "o_proj"), rank_pattern={"blocks.0.q_proj": 0, "blocks.1.q_proj": 2})
    kept = ["blocks.0.o_proj", "blocks.1.q_proj", "blocks.1.o_proj"]
    model, fresh = toy.toy(), toy.toy()
    assert list(ll.find_targets(model, cfg)) == kept
    handle = toy.perturb(ll.attach(model, cfg))
    assert list(handle.layers) == kept
    assert handle.skipped == {"blocks.0.q_proj": "rank 0"}
    handle.save(tmp_path / "a.safetensors")
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert set(loaded.skipped) >= set(handle.skipped)
    assert (list(loaded.layers), loaded.config) == (kept, cfg)
    assert torch.equal(fresh(toy.inputs(3, 24)), model(toy.inputs(3, 24)))


def test_cross_entropy_is_that_of_torch():
    """The default loss of logits without a mask, written with torch's own function."""
    logits = toy.inputs(2, 12, 64)
    model = nn.Module()
    model.forward = lambda input_ids: SimpleNamespace(logits=logits)
    got = default_loss(model, {"input_ids": IDS})
    assert torch.equal(got, F.cross_entropy(logits[:, :-1].reshape(-1, 64), IDS[:, 1:].reshape(-1)))
