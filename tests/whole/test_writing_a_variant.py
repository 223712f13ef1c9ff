"""docs/writing-a-variant.md: its blocks are a module that the conformance suite accepts; it explains every word there is."""

import dataclasses
import re
import sys
import types

import pytest

import lora_lite as ll
from lora_lite.calibration import statistics
from lora_lite.contract import AdapterConfig, Claims, ParamSpec, limits, registry
from lora_lite.testing import CHECKS, checks, toy
from tests import ROOT

TEXT = (ROOT / "docs" / "writing-a-variant.md").read_text()
OTHERS = ("FromWeight", "FromData", "InputGain", "Common")


@pytest.fixture
def page(monkeypatch):
    """The module that the page's blocks make, registered for the time of the test."""
    registry.discover()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    module = types.ModuleType("half_lora")
    monkeypatch.setitem(sys.modules, "half_lora", module)
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL))
    exec(compile(code, "half_lora.py", "exec"), vars(module))  # with `check_variant(HalfLoRA)` of the page
    return module


def test_the_variant_of_the_page_is_lawful_and_starts_from_data(page):
    assert set(registry.card(page.HalfLoRA)) == {"title", *registry.CARD_FIELDS}
    assert {adapter.report["captured"] > 0 for adapter in page.handle.layers.values()} == {True}
    A = next(iter(page.handle.layers.values())).A
    assert (A @ A.T).allclose(A.new_tensor(1.0).expand(len(A)).diag(), atol=1e-6)
    with pytest.raises(ll.LoraLiteError, match="oversample is 1 or more"):
        ll.config("half_lora", oversample=0)
    for name in OTHERS:
        for check in checks(getattr(page, name)):
            if check.function.__name__ != "check_compiles":  # a third of the time
                check()


def test_the_other_shapes_do_what_the_page_says(page):
    with registry.borrowed(page.FromData):
        ranked = ll.attach(toy.toy(), page.FromDataConfig(r=4), toy.batches())
    assert {adapter.cfg.r for adapter in ranked.layers.values()} == {2, 4}
    with registry.borrowed(page.Common):
        layers = list(ll.attach(toy.toy(), page.CommonConfig(r=4)).layers.values())
    assert len({adapter.A.untyped_storage().data_ptr() for adapter in layers}) == 1
    W = toy.toy().get_parameter("blocks.0.q_proj.weight")
    with registry.borrowed(page.FromWeight):
        A = ll.attach(toy.toy(), page.FromWeightConfig(r=4)).layers["blocks.0.q_proj"].A
    assert (W[:4] @ A.T @ A).allclose(W[:4], atol=1e-6)


def rows(heading: str) -> dict[str, str]:
    """{name in the first column: the rest of the row} of the tables below a heading."""
    part = re.split(rf"^#+ {heading}$", TEXT, flags=re.MULTILINE)[1]
    part = re.split(r"^#+ ", re.sub(r"```.*?```", "", part, flags=re.DOTALL), flags=re.MULTILINE)[0]
    found = {}
    for first, rest in re.findall(r"^\| (`.*?`) \|(.*)\|$", part, flags=re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"`([^`]*)`", first.replace("\\|", "|")), rest))
    return found


def test_tables_of_fields_hold_each_field_with_its_default():
    assert set(rows("Config")) == {field.name for field in dataclasses.fields(AdapterConfig)}
    for heading, kind in (("Claims", Claims), ("param_specs", ParamSpec)):
        told = rows(heading)
        assert list(told) == [field.name for field in dataclasses.fields(kind)]
        for field in dataclasses.fields(kind):
            default = re.match(r" `(.*?)` \|", told[field.name])
            shown = "zeros" if field.name == "start" and kind is ParamSpec else repr(field.default)
            assert (default[1] if default else None) == (None if field.default is dataclasses.MISSING else shown), field.name


def test_every_method_of_the_contract_is_there_with_its_arguments():
    for name, arguments in registry.CONTRACT.items():
        assert f"`{name}({', '.join(arguments)})`" in TEXT, name
    for name, function in vars(limits).items():
        assert not isinstance(function, types.FunctionType) or f"`{name}(" in TEXT, name


def test_the_table_of_statistics_holds_each_and_no_other():
    told = set(rows("Statistics"))
    documented = set(re.findall(r"^    ([\w]+(?:\[[\w,]+\])?)(?:  )", statistics.__doc__, flags=re.MULTILINE))
    assert told == {*statistics.STATISTICS, *statistics.EITHER, *documented}
    for name in told:
        statistics.parse(name.replace("[q,m]", "[8,64]").replace("[q]", "[0.5]"))


def test_the_table_of_checks_holds_each_in_order():
    assert list(rows("The checks")) == [check.__name__ for check in CHECKS]
