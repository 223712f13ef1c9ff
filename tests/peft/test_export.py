"""export_peft: what PEFT loads gives our logits, plain LoRA is what servers read, and a refusal writes nothing."""

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract import registry
from lora_lite.peft import folder as peft_folder
from lora_lite.peft.export import Exported
from lora_lite.peft.folder import read_folder
from lora_lite.peft.layout import layouts
from lora_lite.testing import toy
from tests.oracles import compat_quantised as kinds
from tests.oracles.compat_peft import SQUARE, TOLERANCE, attached, check_export, perturb
from tests.oracles.peft_cases import NAMES, distance, gpt2, in_peft, logits, peft, quietly, qwen

BOUNDED = [name for name in ll.names() if ll.get(name).claims.rank]
UNBOUNDED = [name for name in ll.names() if name not in BOUNDED and name not in layouts()]


def leaves(model, folder, base=qwen, **options):
    """(what the export reports, PEFT's options, PEFT's tensors) of a folder that gives in PEFT the logits of the model."""
    written = ll.export_peft(model, folder, **options)
    assert distance(in_peft(base, folder), logits(model)) < TOLERANCE
    return written, *read_folder(folder)


@pytest.mark.parametrize("base", [qwen, gpt2])
@pytest.mark.parametrize("variant", ll.names())
def test_every_variant_leaves_for_peft_with_its_logits(variant, base):
    verdict = check_export(variant, base)
    if variant in BOUNDED:
        assert verdict in ("yes", "yes, as LoRA")
    elif variant in layouts():
        assert verdict == "yes" or (base is gpt2 and not layouts()[variant].conv1d)
    else:
        assert verdict == "as LoRA of a chosen rank"


@pytest.mark.parametrize("variant", BOUNDED)
def test_plain_lora_is_exact_at_the_claimed_rank_and_no_larger(variant, tmp_path):
    model, handle = attached(variant)
    written, options, tensors = leaves(model, tmp_path / "a", plain=True)
    claimed = max(min(a.claims.rank(a.cfg), a.d_in, a.d_out) for a in handle.layers.values())
    assert (written.rank, options["r"], options["lora_alpha"]) == (claimed, claimed, claimed)
    assert 0 < written.worst < 1e-6
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {claimed}
    again = qwen()
    ll.load_peft(again, tmp_path / "a")
    assert distance(logits(again), logits(model)) < TOLERANCE


@pytest.mark.parametrize("coeff", [0.5, -1.0, 0.0])
@pytest.mark.parametrize("variant", ["lora", "hra", "pissa"])
def test_the_coefficient_is_part_of_the_numbers(variant, coeff, tmp_path):
    model, handle = attached(variant)
    handle.scale(coeff)
    written, _, _ = leaves(model, tmp_path / "a")
    assert written.rank is not None
    assert f"the coefficient {coeff}" in str(written)


def test_a_form_of_lora_that_peft_lacks_leaves_as_plain_lora_of_its_own_rank(tmp_path):
    model, _ = attached("lora", init="orthogonal")
    assert leaves(model, tmp_path / "a")[0].rank == 16


def test_several_adapters_leave_as_one(tmp_path):
    model, _ = attached("lora")
    perturb(ll.attach(model, ll.config("hra", r=4, targets=("q_proj", "k_proj")), name="turn"))
    ll.scale(model, 0.5, name="turn")
    assert leaves(model, tmp_path / "both")[0].rank == 12
    with ll.disabled(model, "turn"):
        want = logits(model)
    assert ll.export_peft(model, tmp_path / "one", name="default").rank is None
    assert distance(in_peft(qwen, tmp_path / "one"), want) < TOLERANCE


def test_ranks_by_layer_stay_in_peft_and_are_padded_in_plain_lora(tmp_path):
    model, _ = attached("lora", rank_pattern={"q_proj": 2, "re:layers.1.*down": 3})
    _, options, _ = leaves(model, tmp_path / "own")
    assert sorted(options["rank_pattern"].values()) == [2, 2, 3]
    assert options["lora_alpha"] == 16
    _, options, tensors = leaves(model, tmp_path / "plain", plain=True)
    assert "rank_pattern" not in options
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {8}


@pytest.mark.parametrize("variant", ["loha", "lokr"])
@pytest.mark.parametrize("fields", [{"rslora": True}, {"alpha": None}])
def test_scales_that_peft_has_no_word_for_become_its_alpha(variant, fields, tmp_path):
    model, _ = attached(variant, **fields, rank_pattern={"q_proj": 2})
    _, options, _ = leaves(model, tmp_path / "a")
    assert options["peft_type"] == layouts()[variant].peft_type
    assert options["alpha_pattern"]


@pytest.mark.parametrize("base", [qwen, gpt2])
def test_a_bias_that_moves_goes_along_and_is_said(base, tmp_path):
    model, _ = attached("antipasto_ablate", base, targets=("o_proj", "mlp.c_proj")[base is gpt2 :][:1], roles=None)
    written, options, _ = leaves(model, tmp_path / "a", base)
    assert "the bias moves too" in str(written)
    assert options["lora_bias"] is True


@pytest.mark.parametrize("kind", ["eight_bit", "four_bit", "int8"])
def test_a_quantised_base_exports_the_change_of_its_dequantised_weights(kind, tmp_path):
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")

    def base():
        return getattr(kinds, kind)(kinds.pair())

    model, x = base(), toy.inputs(2, kinds.WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes on its casts
        perturb(ll.attach(model, ll.config("pissa", r=4)))
        ll.export_peft(model, tmp_path / "a")
        again = base()
        handle = ll.load_peft(again, tmp_path / "a")
        assert distance(again(x), model(x)) < TOLERANCE
        with handle.scale(0.0):
            assert distance(again(x), model(x)) > 0.02


# --- cut to a rank ------------------------------------------------------------------------------------------------------


def test_a_cut_is_stated_per_layer_and_is_the_best_there_is(tmp_path):
    model, _ = attached("oft", targets=SQUARE)
    written = ll.export_peft(model, tmp_path / "a", rank=12, limit=1.0)
    _, tensors = read_folder(tmp_path / "a")
    assert len(written.errors) == 4
    for path, error in written.errors.items():
        D = ll.delta_weight(model, path).double()
        S = torch.linalg.svdvals(D)
        A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert A.shape[0] == 12
        assert abs(float((D - B @ A).norm() / D.norm()) - error) < 1e-6
        assert abs(float(S[12:].norm() / S.norm()) - error) < 1e-6
        assert f"{path}  {error:.2e}" in str(written)


def test_a_cut_above_the_limit_is_refused_with_the_rank_that_is_not(tmp_path):
    model, _ = attached("oft", targets=SQUARE)
    with pytest.raises(ll.LoraLiteError, match=r"rank=2 cuts off 0\.\d+ of the change of model\.layers.*limit=0\.1") as caught:
        ll.export_peft(model, tmp_path / "a", rank=2)
    rank, limit = re.search(r"rank=(\d+)\)  # or limit=([\d.]+)", str(caught.value)).groups()
    assert not list(tmp_path.iterdir())
    assert ll.export_peft(model, tmp_path / "b", rank=int(rank)).worst <= 0.1
    assert ll.export_peft(model, tmp_path / "c", rank=2, limit=float(limit)).worst <= float(limit)
    with pytest.raises(ll.LoraLiteError, match="cuts off"):
        ll.export_peft(model, tmp_path / "d", rank=int(rank) - 1)


@pytest.mark.parametrize("variant", UNBOUNDED)
def test_without_a_bound_a_rank_must_be_chosen(variant, tmp_path):
    model, _ = attached(variant, targets=SQUARE)
    with pytest.raises(ll.LoraLiteError, match=r"no form of PEFT's own(?s:.)*no bound(?s:.)*rank=16"):
        ll.export_peft(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_options_that_peft_has_once_name_themselves(tmp_path):
    model, _ = attached("oft")
    with pytest.raises(ll.LoraLiteError, match=r"layers differ in oft_block_size \(24, 32\), PEFT has one"):
        ll.export_peft(model, tmp_path / "a")
    model, _ = attached("oft", block_size=8)
    assert ll.export_peft(model, tmp_path / "a").peft_type == "OFT"


def test_an_adapter_at_its_start_is_exported_as_no_change(tmp_path):
    model = qwen()
    ll.attach(model, ll.config("pissa", r=4, targets=NAMES[qwen]))
    assert ll.export_peft(model, tmp_path / "a").worst < 1e-6
    assert distance(in_peft(qwen, tmp_path / "a"), logits(qwen())) < TOLERANCE


# --- what servers read ----------------------------------------------------------------------------------------------------
# vLLM, vllm/lora/peft_helper.py and lora/utils.py (parse_fine_tuned_lora_name); llama.cpp, convert_lora_to_gguf.py


@pytest.mark.parametrize("variant", ["lora", "pissa", "hra", "antipasto"])
def test_plain_lora_is_what_vllm_and_llama_cpp_document(variant, tmp_path):
    model, handle = attached(variant, rank_pattern={"q_proj": 4})
    ll.export_peft(model, tmp_path / "a", plain=True)
    options, tensors = read_folder(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]
    keys = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    named = [keys.fullmatch(key).groups() for key in tensors]
    assert sorted(named) == sorted((path, side) for path in handle.layers for side in "AB")
    for path, a in handle.layers.items():  # llama.cpp: A (rank, row), B (column, rank), one dtype, both there
        A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        assert (A.shape[1], B.shape[0]) == (a.d_in, a.d_out)
        assert A.dtype == B.dtype == torch.float32
        assert A.shape[0] == B.shape[1] == options["r"]  # vLLM divides lora_alpha by the config's, llama.cpp by the tensor's
    assert options["lora_alpha"] == options["r"] <= 512
    assert (options["bias"], options["modules_to_save"], options["use_dora"]) == ("none", None, False)
    assert options["lora_bias"] is options["use_rslora"] is False
    assert set(options["target_modules"]) == set(handle.layers)
    assert not {"rank_pattern", "alpha_pattern", "lora_embedding_A"} & options.keys()
    assert {"r", "lora_alpha", "target_modules", "base_model_name_or_path"} <= options.keys()


# --- the folder -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """The path of one layer is the end of another's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.part = nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, x):
        return self.part["fc"](torch.tanh(self.fc(x)))


def test_paths_that_end_alike_do_not_take_each_other_along(tmp_path):
    model = toy.seeded(Nested)
    perturb(ll.attach(model, ll.config("lora", r=2, targets=("re:^fc$",))))
    ll.export_peft(model, tmp_path / "a")
    theirs = quietly(peft.PeftModel.from_pretrained, toy.seeded(Nested), tmp_path / "a")
    x = toy.inputs(5, 8)
    assert not [k for k in theirs.state_dict() if "part" in k and "lora" in k]
    assert distance(theirs(x), model(x)) < TOLERANCE


def test_nothing_is_written_over_and_nothing_is_left_by_an_interruption(tmp_path, monkeypatch):
    model, _ = attached("lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for folder, word in (("full", "Nothing is written over"), ("nowhere/a", "does not exist")):
        with pytest.raises(ll.LoraLiteError, match=word):
            ll.export_peft(model, tmp_path / folder)
    (tmp_path / "empty").mkdir()
    ll.export_peft(model, tmp_path / "empty")

    def interrupted(path, content):
        Path(path).write_bytes(content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_folder, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ll.export_peft(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_the_folder_has_the_rights_of_a_new_one(tmp_path):
    model, _ = attached("lora")
    ll.export_peft(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_states_that_have_no_export_are_refused(tmp_path):
    model, handle = attached("lora")
    folder = tmp_path / "a"
    for rank in (0, -1, 2.5, True, "8"):
        with pytest.raises(ll.LoraLiteError, match="is no rank"):
            ll.export_peft(model, folder, rank=rank)
    with pytest.raises(ll.LoraLiteError, match="no adapter 'stlye'"):
        ll.export_peft(model, folder, name="stlye")
    with pytest.raises(ll.LoraLiteError, match="attached through another module"):
        ll.export_peft(model.model, folder)
    ll.merge(model)
    with pytest.raises(ll.LoraLiteError, match="is merged"):
        ll.export_peft(model, folder)
    ll.unmerge(model)
    with ll.scale(model, torch.ones(2)), pytest.raises(ll.LoraLiteError, match="coefficient per sample"):
        ll.export_peft(model, folder)
    with torch.no_grad():
        next(iter(handle.layers.values())).A.fill_(float("nan"))
    with pytest.raises(ll.LoraLiteError, match="is not finite"):
        ll.export_peft(model, folder)
    handle.detach()
    with pytest.raises(ll.LoraLiteError, match="has no adapter"):
        ll.export_peft(model, folder)
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_path_is_refused(tmp_path):
    layer = nn.Linear(8, 8)
    ll.attach(layer, ll.config("lora", r=2))
    with pytest.raises(ll.LoraLiteError, match="The model itself is the adapted layer"):
        ll.export_peft(layer, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_map_that_is_not_linear_is_refused(tmp_path):
    from tests.testing.test_planted_faults import Sound

    class Bent(Sound):
        claims = ll.Claims(affine=False)

    with registry.borrowed(Bent):
        model = toy.one()
        ll.attach(model, Bent.Config())
        with pytest.raises(ll.LoraLiteError, match="not a linear map"):
            ll.export_peft(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_config_says_what_the_base_was(tmp_path):
    base = qwen()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    ll.attach(model, ll.config("lora", r=2, targets=("q_proj",)))
    ll.export_peft(model, tmp_path / "a")
    options = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(tmp_path / "base")
    auto = quietly(peft.AutoPeftModel.from_pretrained, tmp_path / "a")
    assert distance(logits(auto.eval()), logits(model.eval())) < TOLERANCE


def test_report_of_an_exact_export_is_one_line():
    assert str(Exported(Path("a"), "HRA", None, {}, ())) == "a: PEFT's own HRA, exact"
    assert str(Exported(Path("a"), "LORA", 8, {"q": 1e-8}, ())) == "a: plain LoRA of rank 8, scale 1, exact"


def test_guide_runs(tmp_path):
    from tests.oracles.guide import blocks

    names = {"ll": ll, "torch": torch, "model": qwen(), "folder": tmp_path}
    out, cut, back, parts = blocks("peft")
    exec(out, names)
    assert str(names["report"]).endswith("adapter: plain LoRA of rank 8, scale 1, exact")
    for block in (cut, back, parts):
        exec(block, names)
    assert (tmp_path / "style.safetensors").exists()
