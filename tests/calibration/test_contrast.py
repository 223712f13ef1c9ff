"""The difference of two classes' means: what is no difference, what one channel makes of it, and norms behind the layer."""

import warnings

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.calibration import at_layer, norms_behind
from lora_lite.calibration.norms import in_stream, probed
from lora_lite.testing import toy

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


def language_model(name):
    """Norms as after training: none is 1."""
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    more = {} if name == "Olmo2" else {"head_dim": 8}
    made = toy.seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config(**SMALL, **more)))
    generator = torch.Generator().manual_seed(1)
    for key, p in made.named_parameters():
        if "norm" in key:
            p.data.add_(0.5 * torch.randn(p.shape, generator=generator))
    return made.eval()


def ids(seed=1, low=1, high=64):
    return torch.randint(low, high, (8, 12), generator=torch.Generator().manual_seed(seed))


# --- equal classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winsorize", [1.0, 0.9])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_equal_classes_in_other_batches_have_no_contrast(positions, winsorize, dtype):
    model = language_model("Qwen3").to(dtype)
    data = {"positive": [{"input_ids": ids()}], "negative": [{"input_ids": row[None]} for row in ids()]}
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: the mean outputs on positive and negative data are equal up to"):
        ll.attach(model, ll.config("antipasto_ablate", r=4, positions=positions, winsorize=winsorize), data)
    with pytest.raises(ll.LoraLiteError, match="equal up to rounding"):
        ll.attach(model, ll.config("antipasto", r=4, basis="select", select_score="contrast", roles=None), data)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_classes_a_thousandth_apart_have_one(size):
    made, x, d = toy.one(24, 32, False), toy.inputs(64, 24), toy.inputs(24, seed=5)
    adapter = ll.attach(
        made, ll.config("antipasto_ablate", r=4, roles=None), {"positive": [x + size * d], "negative": [x]}
    ).layers["o_proj"]
    found, wanted = (adapter.U @ adapter.v)[:, 0].detach(), made.o_proj.weight.detach() @ d
    assert abs(torch.cosine_similarity(found, wanted, 0)) > 0.999


# --- a massive channel -----------------------------------------------------------------------------------------------


def planted():
    """Two classes along d, and channel 7 of size 800, whose means happen to lie 3 apart where d makes 2."""
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential()
    made.o_proj = nn.Linear(32, 32, bias=False)
    made.o_proj.weight.data.copy_(torch.eye(32))
    d = torch.randn(32, generator=generator)
    d[7] = 0
    d /= d.norm()

    def part(sign):
        x = torch.randn(64, 1, 32, generator=generator) * 0.5 + sign * d
        drift = 20 * torch.randn(64, 1, generator=generator)
        x[:, :, 7] = 800 + drift - drift.mean() + 1.5 * sign
        return [x]

    return made, d, {"positive": part(1), "negative": part(-1)}


@pytest.mark.parametrize("name", ["antipasto_ablate", "antipasto"])
def test_massive_channel_that_holds_the_contrast_is_named(name):
    made, _, data = planted()
    fields = {} if name == "antipasto_ablate" else {"basis": "select", "select_score": "contrast"}
    with pytest.warns(ll.LoraLiteWarning, match=r"massive channel.*o_proj \(channel 7, .*the median.*winsorize=0.95") as seen:
        ll.attach(made, ll.config(name, r=4, **fields), data)
    assert len(seen) == 1


def test_winsorized_means_find_the_planted_direction():
    cosines = {}
    for winsorize in (1.0, 0.9):
        made, d, data = planted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if winsorize == 1 else "error", ll.LoraLiteWarning)
            adapter = ll.attach(made, ll.config("antipasto_ablate", r=4, winsorize=winsorize), data).layers["o_proj"]
        direction = (adapter.U @ adapter.v)[:, 0].detach()
        cosines[winsorize] = float(abs(direction @ d) / direction.norm())
    assert cosines[1.0] < 0.75
    assert cosines[0.9] > 0.95


def test_winsorize_is_kept_in_json_and_refused_out_of_range_and_unused():
    sums = ll.config("antipasto_ablate", winsorize=0.99)
    assert type(sums).from_json(sums.to_json()) == sums
    for value in (0.2, 1.5):
        with pytest.raises(ll.LoraLiteError, match=r"winsorize is a quantile from 0\.5 to 1"):
            ll.config("antipasto_ablate", winsorize=value)
    with pytest.raises(ll.LoraLiteError, match=r"winsorize is 1\.0 with the other options"):
        ll.config("antipasto", winsorize=0.9)


# --- captured share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (24, 24), (32, 24)])
@pytest.mark.parametrize("fields", [{}, {"basis": "corda"}, {"basis": "corda_full"}, {"basis": "asvd"}, {"basis": "select"}])
def test_reported_capture_is_the_share_of_the_outputs_in_the_basis(size, fields):
    d_in, d_out = size
    made, x = toy.one(d_in, d_out, True), toy.inputs(400, d_in) * torch.linspace(0.3, 2, d_in)
    adapter = ll.attach(made, ll.config("antipasto", r=4, **fields), [x]).layers["o_proj"]
    y = x @ made.o_proj.weight.detach().T
    share = float((y @ adapter.U).square().sum() / y.square().sum())
    if "capture" in adapter.report:
        assert abs(adapter.report["capture"] - share) < 1e-4
    assert "capture" in adapter.report or fields == {"basis": "asvd"}


# --- norms between the layer and the stream --------------------------------------------------------------------------


def stream_share(made, r):
    with torch.no_grad():
        states = made(ids(), output_hidden_states=True).hidden_states[:-1]
    return [float(((x @ r).square().mean() / x.square().mean(-1).mean()).sqrt()) for x in states]


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Olmo2"])
def test_one_direction_taken_off_every_writer_through_its_norm_leaves_none_of_it_in_the_stream(name):
    made = language_model(name)
    r = toy.inputs(32, seed=3)
    r = r / r.norm()
    E = made.model.embed_tokens.weight.data
    E -= torch.outer(E @ r, r)
    cfg = ll.config("antipasto_ablate", r=1, init_alpha=1.0, seed_direction="random")
    targets = ll.find_targets(made, cfg)
    norms = norms_behind(made, targets, {"input_ids": ids()})
    assert all(len(norms[path]) == 2 for path in targets), "every writer stands before a norm"
    handle = ll.attach(made, cfg)
    left = {}
    for through in (False, True):
        for path, adapter in handle.layers.items():
            adapter.U.copy_((at_layer(r, norms[path]) if through else r)[:, None])
            adapter.v.data.fill_(1)
        left[through] = max(stream_share(made, r))
    with ll.disabled(made):
        assert max(stream_share(made, r)) > 0.3
    assert left[True] < 1e-5
    assert left[False] > 0.05, "the direction itself is not enough here"


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Olmo2"])
def test_contrast_behind_a_norm_is_taken_off_what_the_norm_gives_on(name):
    made = language_model(name)
    data = {"positive": [{"input_ids": ids(1, 1, 32)}], "negative": [{"input_ids": ids(2, 32, 64)}]}
    targets = ll.find_targets(made, ll.config("antipasto_ablate", r=4))
    norms = norms_behind(made, targets, data["positive"][0])
    means = {path: [] for path in targets}
    for part in data.values():
        hooks = [
            layer.register_forward_hook(lambda _, args, y, path=path: means[path].append(y[:, -1].mean(0).detach()))
            for path, layer in targets.items()
        ]
        made(**part[0])
        for hook in hooks:
            hook.remove()
    handle = ll.attach(made, ll.config("antipasto_ablate", r=4, init_alpha=1.0), data)
    for path, adapter in handle.layers.items():
        r = in_stream(means[path][0] - means[path][1], norms[path])
        found, wanted = (adapter.U @ adapter.v)[:, 0].detach(), at_layer(r, norms[path])
        assert abs(torch.cosine_similarity(found, wanted, 0)) > 0.9999, path


def test_models_without_such_norms_have_none_and_their_contrast_is_the_plain_one():
    made = language_model("Qwen3")
    targets = ll.find_targets(made, ll.config("antipasto_ablate", r=4))
    assert all(len(w) == 0 for w in norms_behind(made, targets, {"input_ids": ids()}).values())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, y):
        return y * self.weight


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16), lambda: nn.RMSNorm(16, elementwise_affine=False), Scaled],
    ids=["layer norm", "rms norm", "rms norm without weight", "layer scale"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_direction_is_left_behind_a_norm_of_any_kind(make, dtype):
    norm = toy.seeded(make)
    for p in norm.parameters():
        p.data.add_(0.5 * toy.inputs(*p.shape, seed=4))
    w = probed(norm.to(dtype), 16)
    norm = norm.float()
    r = toy.inputs(16, seed=6)
    d = at_layer(r, w)
    y = toy.inputs(50, 16)
    out = norm(y - torch.outer(y @ d, d)).detach() - norm(torch.zeros(16)).detach()
    assert (out @ r).abs().max() < 1e-5
    assert (norm(y).detach() @ r).std() > 0.1


def test_what_is_no_norm_has_no_weight_and_is_named():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(24))

        def forward(self, y):
            return y.sigmoid() * self.weight

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj, self.gate = nn.Linear(24, 24), Gate()

        def forward(self, x):
            return x + self.gate(self.o_proj(x))

    made = toy.seeded(Made)
    assert probed(nn.GELU(), 16) is None
    with pytest.warns(ll.LoraLiteWarning, match=r"Behind o_proj stands Gate, which is no norm"):
        found = norms_behind(made, {"o_proj": made.o_proj}, toy.inputs(4, 24))
    assert len(found["o_proj"]) == 0
