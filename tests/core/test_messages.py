"""Bad input: an error that names the thing, says what was expected, gives the fix as code, and changes nothing."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph

READERS = ("blocks.0.q_proj", "blocks.1.q_proj", "blocks.0.up_proj", "blocks.1.up_proj")


def refusal(call, *words, model=None):
    """The error of `call` holds every word; `model` is as it was."""
    before = None if model is None else photograph(model)
    with pytest.raises(ll.LoraLiteError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    if model is not None:
        demand_same(model, before, "after a refusal")


def test_unknown_variant_suggests_the_nearest_name():
    refusal(lambda: ll.config("lroa"), "'lroa'", "Closest name: lora", "ll.names()")
    refusal(lambda: ll.get("zzz"), "Known:", "lora")


def test_unknown_field_suggests_the_right_one():
    refusal(lambda: ll.config("lora", alfa=3), "no field 'alfa'", "Closest name: alpha")
    refusal(lambda: ll.LoRAConfig(dropout=0.1), "no field 'dropout'")


def test_value_of_the_wrong_kind():
    refusal(lambda: ll.config("lora", r="8"), "r='8'", "int")
    refusal(lambda: ll.config("lora", init="kaimng"), "'kaimng'", "'kaiming'")
    refusal(lambda: ll.config("lora", r=0), "r=0", "above 0")
    refusal(lambda: ll.config("lora", targets="q_proj("), "q_proj(", "regular expression")
    refusal(lambda: ll.config("lora", targets=()), "targets=()")
    refusal(lambda: ll.config("lora", dtype="float33"), "dtype='float33'")


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("r", 0, "r=8"),
        ("r", "4", "r=4"),
        ("r", 4.0, "r=4"),
        ("r", 10**9, "r=8"),
        ("alpha", "16", "alpha=16.0"),
        ("lr", 0, "lr=0.0001"),
        ("dtype", "bf16", "dtype=torch.bfloat16"),
        ("dtype", torch.int8, "dtype=torch.float32"),
        ("layers", 1, "layers=(1,)"),
        ("layers", range(2), "layers=(0, 1)"),
        ("roles", "raeder", "roles=None"),
        ("targets", {"up_proj", "q_proj"}, "targets=('q_proj', 'up_proj')"),
        ("targets", None, "targets='all-linear'"),
        ("targets", (), "targets='all-linear'"),
        ("targets", "q_proj,up_proj", "targets=('q_proj', 'up_proj')"),
        ("targets", ("q_proj|up_proj", "o_proj"), "targets=('q_proj', 'up_proj', 'o_proj')"),
        ("exclude", "q_proj, up_proj", "exclude=('q_proj', 'up_proj')"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern={'q_proj': 0}"),
        ("rank_pattern", {"q_proj,up_proj": 2}, "rank_pattern={'q_proj': 2, 'up_proj': 2}"),
        ("init", "kaimng", "init='kaiming'"),
    ],
    ids=lambda one: str(sorted(one)) if isinstance(one, set) else str(one),
)
def test_an_option_that_cannot_be_is_repaired_with_the_nearest_value_that_can(field, value, fix):
    with pytest.raises(ll.LoraLiteError) as caught:
        ll.config("lora", **{field: value})
    assert str(caught.value).split("\n    ")[1] == fix
    cfg = eval(f"ll.config('lora', {fix})", {"ll": ll, "torch": torch})
    if field != "roles":
        assert ll.attach(toy.toy(), cfg).layers


@pytest.mark.parametrize(
    ("gains", "words", "count"),
    [
        ({"q_prj": 0.5}, ("Closest name: q_proj", "ll.scale(model, {'q_proj': 0.5})"), 2),
        ({"o_proj": 0.5, "nowhere": 2.0}, ("'nowhere' fits no adapted layer",), 4),
        ({"blocks.0": 0.5, "blocks.?": 0.2}, ("equally long",), 4),
        ({"q_proj,o_proj": 0.5}, ("{'q_proj': 0.5, 'o_proj': 0.5}",), 4),
    ],
)
def test_gains_that_fit_nothing_or_two_things_are_repaired_whole(gains, words, count):
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora", targets=("q_proj", "o_proj")))
    with pytest.raises(ll.LoraLiteError) as caught:
        ll.scale(model, gains)
    assert all(word in str(caught.value) for word in words)
    eval(str(caught.value).split("\n    ")[1], {"ll": ll, "model": model})
    assert sum(adapter.coeff != 1 for adapter in handle.layers.values()) == count


def computed(how):
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(8, 8)})}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        how(model.get_submodule("a.b"))
    return model


@pytest.mark.parametrize(
    "how",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "parametrization", "prune"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_made_a_parameter_by_the_repair_of_merge(how):
    model = computed(how)
    ll.attach(model, ll.config("lora", r=2))
    with pytest.raises(ll.LoraLiteError, match=r"a\.b is computed") as caught:
        ll.merge(model)
    exec(str(caught.value).split("\n    ")[1], {"torch": torch, "model": model})
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "default" not in name)
    ll.merge(model)


class Pipeline:
    def __init__(self):
        self.scheduler, self.vae, self.unet = object(), nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, ("A NoneType is no model", "pipe.unet or pipe.transformer")),
        ([nn.Linear(8, 8)], ("A list is no model", "torch.nn.Module")),
        (nn.Linear, ("no model",)),
        (Pipeline(), ("It holds pipe.unet, pipe.vae", "ll.attach(pipe.unet, cfg)")),
    ],
    ids=["none", "list", "class", "pipeline"],
)
def test_what_is_no_module_is_told_so(model, words):
    for call in (ll.attach, ll.find_targets):
        refusal(lambda call=call: call(model, ll.config("lora")), *words)


def test_option_that_a_method_does_not_have_is_refused_not_ignored():
    for name in ll.names():
        cls = ll.get(name)
        if cls.Config().r is None:
            refusal(lambda name=name: ll.config(name, r=4), "r=4", "would be ignored")
            refusal(lambda name=name: ll.config(name, rank_pattern={"q_proj": 2}), "rank_pattern")


def test_no_target_matched_lists_what_there_is():
    model = toy.toy()
    refusal(
        lambda: ll.attach(model, ll.config("lora", targets=("query",))), "'query'", "q_proj x2", "down_proj x2", model=model
    )
    refusal(lambda: ll.attach(model, ll.config("lora", targets=("q_porj",))), "Closest name: q_proj", model=model)
    refusal(lambda: ll.attach(model, ll.config("lora", targets=("q_proj", "nope"))), "'nope'", model=model)
    refusal(lambda: ll.attach(model, ll.config("lora", layers=(7,))), "no block 7", "0 to 1", model=model)
    refusal(lambda: ll.attach(model, ll.config("lora", targets="q_proj", exclude="q_proj")), "select no Linear", model=model)
    refusal(lambda: ll.attach(model, ll.config("lora", rank_pattern={"nope": 2})), "rank_pattern", "'nope'", model=model)


def test_selection_that_other_options_leave_out_is_refused_not_ignored():
    model = toy.toy()
    for fields, words in (
        (
            {"targets": ("q_proj", "down_proj"), "exclude": ("q_proj",)},
            ("targets: 'q_proj'", "leave out", "targets=('down_proj',), exclude=('q_proj',)"),
        ),
        ({"targets": ("0.q_proj", "1.o_proj"), "layers": (0,)}, ("1.o_proj", "layers=(0,)")),
        ({"targets": ("q_proj",), "rank_pattern": {"down_proj": 4}}, ("rank_pattern: 'down_proj'",)),
        ({"exclude": ("down_prj",)}, ("exclude: 'down_prj' matches no module", "Closest name: down_proj")),
    ):
        refusal(lambda fields=fields: ll.attach(model, ll.config("lora", **fields)), *words, model=model)


def test_numbers_that_are_not_finite():
    for field in ("coeff", "alpha", "lr"):
        refusal(lambda field=field: ll.config("lora", **{field: float("nan")}), field, "finite")


def test_inference_mode_and_meta_device():
    model = toy.toy()
    with torch.inference_mode():
        refusal(lambda: ll.attach(model, ll.config("lora")), "inference mode", model=model)
    refusal(
        lambda: ll.attach(toy.toy().to("meta"), ll.config("lora")), "blocks.0.q_proj has no weights", "meta device", "to_empty"
    )
    model = toy.toy().to("meta").to_empty(device="cpu")
    assert ll.attach(model, ll.config("lora")).layers


def test_lost_hooks_name_each_layer_of_one_adapter_once():
    model = toy.toy()
    for name, leaf in (("a", "q_proj"), ("b", "o_proj")):
        ll.attach(model, ll.config("lora", targets=(leaf,)), name=name)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    refusal(lambda: ll.merge(model), "'a' are gone from blocks.0.q_proj, blocks.1.q_proj:", "ll.repair(model)", model=model)


def test_a_name_in_use_is_repaired_by_the_argument_that_apply_and_load_take_too():
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    taken = ll.snapshot(model)
    with pytest.raises(ll.LoraLiteError) as raised:
        ll.apply(model, taken, name="default")
    assert str(raised.value).splitlines()[-1].strip() == 'name="default_2"'


def test_rank_above_the_layer_names_the_layer():
    model = toy.toy()
    for name in ll.names():
        cls = ll.get(name)
        try:
            cls.param_specs(24, 32, cls.Config() if cls.Config().r is None else cls.Config(r=26))
        except ll.LoraLiteError:
            data = toy.calibration(cls, toy.small(cls))
            refusal(
                lambda name=name, data=data: ll.attach(model, ll.config(name, r=26, targets=("q_proj",), roles=None), data),
                "blocks.0.q_proj (d_in=24, d_out=32)",
                "r=26",
                "24",
                model=model,
            )


def test_some_variant_bounds_its_rank():
    with pytest.raises(ll.LoraLiteError):
        ll.attach(toy.toy(), ll.config("pissa", r=26))


def test_block_size_that_does_not_divide_names_the_layer():
    model = toy.toy()
    refusal(
        lambda: ll.attach(model, ll.config("oft", block_size=5)),
        "blocks.0.q_proj",
        "block_size=5",
        "24",
        "block_size=4",
        model=model,
    )


def needy():
    """A variant that needs second moments of calibration data, whichever the registry has."""
    classes = map(ll.get, ll.names())
    return next(cls for cls in classes if any("moment" in statistic for statistic in cls.needs(cls.Config())))


def needy_attach(data, model, **fields):
    cls = needy()
    import dataclasses

    return ll.attach(model, dataclasses.replace(toy.small(cls), **fields), data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ("calibration_data is missing", "calibration_data=batches")),
        ([], ("empty", "At least one batch")),
        (torch.zeros(2, 24), ("is a Tensor", "[batch]")),
        ({"x": torch.zeros(2, 24)}, ("is a dict", "[batch]")),
        (3, ("is a int",)),
        ([{"x": torch.full((2, 4, 24), torch.nan)}], ("blocks.0.q_proj", "not finite")),
        ([{"x": torch.zeros(1, 2, 24)}], ("calibration tokens are too few", "blocks.0.q_proj", "At least 8")),
        ([{"x": torch.zeros(1, 2, 24), "attention_mask": torch.zeros(1, 2)}], ("0", "padding")),
        ([{"x": torch.zeros(1, 2, 24), "attention_mask": torch.ones(1, 3)}], ("blocks.0.q_proj", "attention_mask")),
        ([{"x": torch.zeros(3, 2, 24), "attention_mask": torch.ones(2, 3)}], ("blocks.0.q_proj", "(2, 3)")),
        ([{"x": torch.zeros(1, 2, 24), "attention_mask": torch.tensor([[0.0, -1e9]])}], ("other numbers than 0 and 1",)),
        ({"positive": [torch.zeros(1, 9, 24)]}, ("only positive", '"negative"')),
    ],
    ids=[
        "missing",
        "empty",
        "tensor",
        "mapping",
        "number",
        "nan",
        "too-few",
        "all-padding",
        "mask-shape",
        "time-first",
        "additive-mask",
        "one-class",
    ],
)
def test_unfit_calibration_data(data, words):
    model = toy.toy()
    refusal(lambda: needy_attach(data, model), *words, model=model)


def test_contrast_from_unlabelled_or_one_sided_data():
    model = toy.toy()
    cfg = ll.config("antipasto_ablate", r=8, seed_direction="contrast")
    refusal(lambda: ll.attach(model, cfg, toy.batches()), "labelled", '{"positive": batches', model=model)
    one_sided = {"positive": toy.batches(), "negative": []}
    refusal(lambda: ll.attach(model, cfg, one_sided), "['negative'] is empty", model=model)
    refusal(lambda: ll.attach(model, cfg, {"negative": toy.batches()}), "only negative", model=model)


def test_calibration_data_that_would_be_ignored():
    model = toy.toy()
    refusal(
        lambda: ll.attach(model, ll.config("lora"), toy.batches()), "would be ignored", "ll.attach(model, cfg)", model=model
    )


def test_layer_that_is_never_called_is_named_by_calibration():
    model = toy.toy()
    model.spare_proj = nn.Linear(24, 24)
    refusal(lambda: needy_attach(toy.batches(), model), "spare_proj", "never called", "exclude=", model=model)


def test_second_adapter_of_the_same_name():
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    refusal(lambda: ll.attach(model, ll.config("lora")), "already", "default", 'name="default_2"', model=model)


def test_name_that_the_layer_uses():
    model = toy.toy()
    for name in ("weight", "in_features", "", 3):
        refusal(lambda name=name: ll.attach(model, ll.config("lora"), name=name), repr(name), 'name="style"', model=model)


def test_config_given_as_a_word():
    refusal(lambda: ll.attach(toy.toy(), "lora"), "needs a config", "ll.config('lora')")


def test_model_without_linear_layers():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
    refusal(lambda: ll.attach(model, ll.config("lora")), "no Linear layers", "Conv1d", model=model)


def test_compiled_model_shows_the_right_order():
    model = toy.toy()
    refusal(
        lambda: ll.attach(torch.compile(model, backend="eager"), ll.config("lora")),
        "compiled",
        "ll.attach(model, cfg); model = torch.compile",
    )
    model.blocks[0].compile(backend="eager")
    refusal(lambda: ll.attach(model, ll.config("lora")), "blocks.0 is compiled")


def test_wrapped_or_sharded_model_shows_the_right_order(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(toy.toy())
        refusal(lambda: ll.attach(wrapped, ll.config("lora")), "DistributedDataParallel", "ll.attach(model, cfg)")
        sharded = toy.toy()
        fully_shard(sharded)
        refusal(lambda: ll.attach(sharded, ll.config("lora")), "DTensor", "ll.attach(model, cfg)")
    finally:
        dist.destroy_process_group()


def test_layer_whose_weight_is_read_and_never_called():
    model = nn.TransformerEncoderLayer(24, 2, 48)
    cfg = ll.config("lora", targets=("linear1", "out_proj"))
    refusal(lambda: ll.attach(model, cfg), "self_attn.out_proj: read, not called", "targets=('linear1',)", model=model)
    assert "read, not called" in ll.attach(model, ll.config("lora")).skipped["self_attn.out_proj"]


def test_weight_shared_with_another_module():
    model = nn.Module()
    model.emb, model.head = nn.Embedding(24, 8), nn.Linear(8, 24, bias=False)
    model.head.weight = model.emb.weight
    refusal(lambda: ll.attach(model, ll.config("lora", exclude=())), "head: tied: shares its weight with emb")


def test_unknown_adapter_names():
    model = toy.toy()
    for call in (lambda: ll.scale(model, 0.5), lambda: ll.merge(model), lambda: ll.disabled(model, "styl").__enter__()):
        refusal(call, "no adapter", model=model)
    refusal(lambda: ll.detach(model, "style"), "no adapter 'style'", "It has none")
    refusal(lambda: ll.save(model, "x.safetensors"), "no adapter")
    ll.attach(model, ll.config("lora"), name="style")
    ll.attach(model, ll.config("lora"), name="tone")
    for call in (
        lambda: ll.detach(model, "styl"),
        lambda: ll.scale(model, 0.5, name="styl"),
        lambda: ll.merge(model, "styl"),
        lambda: ll.disabled(model, "styl").__enter__(),
    ):
        refusal(call, "Closest name: style", model=model)
    refusal(lambda: ll.snapshot(model), "2 adapters", "name='style'")
    refusal(lambda: ll.save(model, "x.safetensors", name="styl"), "Closest name: style")
    refusal(lambda: ll.delta_weight(model, "blocks.9.q_proj"), "blocks.9.q_proj", "blocks.0.q_proj")
    refusal(lambda: ll.merge(model, "style"), "also carries adapter 'tone'", model=model)


def test_coefficients():
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    refusal(lambda: ll.scale(model, "half"), "'half'")
    refusal(lambda: ll.scale(model, float("nan")), "not finite")
    ll.scale(model, torch.ones(5))
    refusal(lambda: model(toy.inputs(3, 4, 24)), "(5,)", "3 samples", "ll.scale(model, coeff[:3])")


def test_two_configs_that_belong_to_no_variant():
    refusal(lambda: ll.attach(toy.toy(), ll.AdapterConfig()), "AdapterConfig belongs to no registered variant")


def test_every_refusal_ends_in_a_line_of_code():
    """The fix stands on a line of its own, indented."""
    with pytest.raises(ll.LoraLiteError) as caught:
        ll.config("lroa")
    assert re.search(r"\n {4}\S", str(caught.value))


def test_roles_that_names_do_not_tell_are_kept_with_a_warning():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    with pytest.warns(ll.LoraLiteWarning, match="cannot tell whether 0, 1"):
        found = ll.find_targets(model, ll.config("lora", roles=("writer",)))
    assert list(found) == ["0", "1"]
    refusal(lambda: ll.find_targets(toy.toy(), ll.config("lora", targets=("q_proj",), roles=("writer",))), "select no Linear")
    handle = ll.attach(toy.toy(), ll.config("lora", roles=("writer",)))
    assert set(handle.skipped) == set(READERS)
