"""Which tokens count, on models of several shapes: a padded batch gives the sums of its rows alone."""

import inspect
import re
import warnings

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.calibration.measure import measure
from lora_lite.calibration.positions import counted
from lora_lite.sites.model import linears
from lora_lite.testing import toy
from lora_lite.testing.checks import error

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NAMES = ("n", "x_sum", "y_sum", "x_sum/last", "n/labels", "x_sum/labels")


def t5():
    config = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL)
    return toy.seeded(lambda: transformers.T5ForConditionalGeneration(config))


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, decoder_start_token_id=2, **SMALL,
    )  # fmt: skip
    return toy.seeded(lambda: transformers.BartForConditionalGeneration(config))


def gpt2(cls="GPT2LMHeadModel"):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SMALL)
    return toy.seeded(lambda: getattr(transformers, cls)(config))


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, init_std=0.3, **SMALL,
    )  # fmt: skip
    return toy.seeded(lambda: transformers.OPTForCausalLM(config))


def bert(cls="BertModel", config="BertConfig", **more):
    config = getattr(transformers, config)(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.3, **SMALL, **more,
    )  # fmt: skip
    return toy.seeded(lambda: getattr(transformers, cls)(config))


def inside(model):
    """Linears below the head, whose weights may be tied."""
    return {path: layer for path, layer in linears(model).items() if "lm_head" not in path}


def ids(rows, length, seed=1):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def kept(*lengths, left=False):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) < n).long() for n in lengths])
    return mask.flip(1) if left else mask


def added(model, batches, names=NAMES):
    """Sums of batches, one measurement each: rows alone share no shapes."""
    sums = [measure(model, inside(model), names, [batch]) for batch in batches]
    return {name: {path: sum(part[name][path] for part in sums) for path in sums[0][name]} for name in names}


# --- encoder-decoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize(("source", "target"), [((4, 9), (5, 3)), ((4, 7), (7, 2)), ((7, 4), (7, 2))])
@pytest.mark.parametrize("given", ["labels", "decoder_attention_mask", "decoder_input_ids"])
def test_encoder_and_decoder_have_masks_of_their_own(make, source, target, given):
    """Unequal and equal lengths; cross-attention reads the encoder's tokens. Every layer, against the rows alone."""
    model, x, words = make().eval(), ids(2, max(source)), ids(2, max(target), 2)
    mask, outside = kept(*source), kept(*target) == 0
    batch = {"input_ids": x.masked_fill(mask == 0, 0), "attention_mask": mask}
    fed = words.masked_fill(outside, 0)
    if given == "labels":
        batch["labels"] = words.masked_fill(outside, -100)
    elif given == "decoder_input_ids":
        batch |= {"decoder_input_ids": fed, "decoder_attention_mask": kept(*target)}
    else:
        batch |= {"labels": words.masked_fill(outside, -100), "decoder_attention_mask": kept(*target)}
    alone = [
        {
            "input_ids": x[k : k + 1, : source[k]],
            ("labels" if "labels" in batch else "decoder_input_ids"): words[k : k + 1, : target[k]],
        }
        for k in (0, 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        got, want = measure(model, inside(model), NAMES, [batch]), added(model, alone)
    for path in inside(model):
        reads_source = path.startswith(("encoder", "model.encoder")) or (
            any(part in path for part in ("EncDecAttention", "encoder_attn"))
            and path.endswith((".k", ".v", "k_proj", "v_proj"))
        )
        assert got["n"][path] == sum(source if reads_source else target), path
        for name in NAMES:
            assert error(got[name][path], want[name][path]) < 1e-4, (name, path)


def test_gradients_of_an_encoder_decoder_are_those_of_autograd():
    model = t5().eval()
    mask, labels = kept(4, 7), ids(2, 7, 2).masked_fill(kept(7, 3) == 0, -100)
    batch = {"input_ids": ids(2, 7), "attention_mask": mask, "labels": labels}
    paths = inside(model)
    loss = model(**batch).loss * 10
    want = dict(zip(paths, torch.autograd.grad(loss, [layer.weight for layer in paths.values()])))
    got = measure(model, paths, ["wgrad"], [batch])["wgrad"]
    for path in paths:
        assert error(got[path], want[path].double()) < 1e-5 * float(want[path].abs().max()) + 1e-6, path


def test_bart_without_decoder_words_counts_the_words_it_makes_of_input_ids():
    model, mask = bart().eval(), kept(4, 7)
    n = measure(model, inside(model), ["n"], [{"input_ids": ids(2, 7), "attention_mask": mask}])["n"]
    assert set(map(int, n.values())) == {11}


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("make", [t5, bart])
def test_methods_attach_to_encoder_decoders_on_padded_batches(make, name):
    model, mask = make(), kept(12, 20)
    labels = ids(2, 15, 2).masked_fill(kept(15, 9) == 0, -100)
    data = [{"input_ids": ids(2, 20), "attention_mask": mask, "labels": labels}]
    handle = ll.attach(model, ll.config(name, r=2, exclude=("lm_head",)), data)
    assert len(handle.layers) > 10


# --- what does not follow the mask -----------------------------------------------------------------------------------


def test_pooler_and_classifier_are_counted_whole_and_it_is_said():
    model, mask = bert("BertForSequenceClassification").eval(), kept(4, 9)
    batch = {"input_ids": ids(2, 9), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    with pytest.warns(ll.LoraLiteWarning, match=r"pooler.dense, classifier: their activations do not follow attention_mask"):
        got = measure(model, linears(model), ("n", "n/last", "n/labels"), [batch])
    heads = {"bert.pooler.dense", "classifier"}
    for path in linears(model):
        assert got["n"][path] == got["n/labels"][path] == (2 if path in heads else 13)
        assert got["n/last"][path] == 2


def test_one_row_more_or_less_than_tokens_does_not_make_samples_tokens():
    """As many samples as tokens, and labels of samples."""
    model, mask = bert("BertForSequenceClassification").eval(), kept(1, 2)
    batch = {"input_ids": ids(2, 2), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    with pytest.warns(ll.LoraLiteWarning, match="classifier"):
        got = measure(model, linears(model), ("n/labels",), [batch])["n/labels"]
    assert got["classifier"] == 2
    assert got["bert.encoder.layer.0.output.dense"] == 3


def two_towers(which, length):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, **SMALL}
    image = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 2,
    }
    config = getattr(transformers, f"{which}Config")(
        text_config={**text, "max_position_embeddings": length}, vision_config=image
    )
    return toy.seeded(lambda: getattr(transformers, f"{which}Model")(config)).eval()


@pytest.mark.parametrize(("which", "patches"), [("CLIP", 17), ("Siglip", 16)])
@pytest.mark.parametrize("chance", [True, False], ids=["as many words as patches", "fewer words"])
def test_image_tower_beside_a_text_with_a_mask(which, patches, chance):
    length = patches if chance else 9
    model = two_towers(which, length)
    mask = kept(4, length)
    words = ids(2, length)
    words[:, -1] = 2
    batch = {"input_ids": words, "attention_mask": mask, "pixel_values": toy.inputs(2, 3, 8, 8)}
    tower = {p: layer for p, layer in linears(model).items() if "encoder" in p}
    with pytest.warns(ll.LoraLiteWarning, match="vision_model.*padding included"):
        got = measure(model, tower, ("n", "x_sum"), [batch])
    for path, n in got["n"].items():
        assert n == (2 * patches if path.startswith("vision") else 4 + length), path
    pixels = {**batch, "attention_mask": torch.ones_like(mask)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        plain = measure(model, tower, ("x_sum",), [pixels])["x_sum"]
    assert all(torch.equal(got["x_sum"][p], plain[p]) for p in tower if p.startswith("vision"))


def test_whisper_counts_labels_in_the_decoder_and_all_frames_in_the_encoder():
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=20,
        decoder_start_token_id=1, **SMALL,
    )  # fmt: skip
    model = toy.seeded(lambda: transformers.WhisperForConditionalGeneration(config)).eval()
    labels = ids(2, 10, 2).masked_fill(kept(10, 3) == 0, -100)  # as many as frames
    n = measure(model, inside(model), ["n"], [{"input_features": toy.inputs(2, 8, 20), "labels": labels}])["n"]
    for path, count in n.items():
        reads_frames = ".encoder." in path or (".encoder_attn." in path and path.endswith(("k_proj", "v_proj")))
        assert count == (20 if reads_frames else 13), path


# --- the last token without a mask -----------------------------------------------------------------------------------


class Flat(nn.Module):
    """Tokens as rows, in several spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.down_proj, self.spelling = nn.Linear(16, 16, bias=False), spelling

    def forward(self, x, attention_mask=None):
        shape = {"rows": (-1, 16), "one": (1, -1, 16), "many": (-1, 1, 16), "kept": x.shape, "cut": (-1, 2, 16)}[self.spelling]
        return self.down_proj(x.reshape(shape)).reshape(x.shape)


@pytest.mark.parametrize("spelling", ["rows", "one", "many", "kept"])
@pytest.mark.parametrize("kind", [lambda x: {"x": x}, lambda x: x, lambda x: (x,), lambda x: {"x": x, "attention_mask": None}])
def test_last_tokens_of_flattened_rows_are_those_of_the_batch(spelling, kind):
    x = toy.inputs(4, 12, 16, dtype=torch.float64)
    model = toy.seeded(lambda: Flat(spelling)).double()
    got = measure(model, {"down_proj": model.down_proj}, ("n/last", "x_sum/last", "n"), [kind(x)])
    assert (got["n/last"]["down_proj"], got["n"]["down_proj"]) == (4, 48)
    assert error(got["x_sum/last"]["down_proj"], x[:, -1].sum(0)) < 1e-12


def test_last_tokens_that_cannot_be_told_are_refused_by_layer_and_repair():
    model = Flat("cut")
    with pytest.raises(ll.LoraLiteError, match=r'down_proj sees activations of shape \(24, 2, 16\)(.|\n)*positions="all"'):
        measure(model, {"down_proj": model.down_proj}, ["n/last"], [{"x": toy.inputs(4, 12, 16)}])
    assert measure(model, {"down_proj": model.down_proj}, ["n"], [{"x": toy.inputs(4, 12, 16)}])["n"]["down_proj"] == 48


# --- positions behind padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "close"),
    [
        (gpt2, 1e-5),
        (lambda: gpt2("GPT2ForSequenceClassification"), 1e-5),
        (opt, 1e-5),
        (bert, 1e-5),
        (lambda: bert("RobertaModel", "RobertaConfig"), 1e-5),
    ],
    ids=["gpt2", "gpt2 classifier", "opt", "bert", "roberta"],
)
def test_rows_behind_padding_give_the_sums_of_the_rows_alone(make, close):
    model, lengths = make().eval(), (4, 9)
    if hasattr(model, "score"):
        model.config.pad_token_id = 0
    layers = {p: layer for p, layer in inside(model).items() if "pooler" not in p and "score" not in p}
    rows = [ids(1, n, n) for n in lengths]
    mask = kept(*lengths, left=True)
    padded = torch.zeros_like(mask)
    for k, row in enumerate(rows):
        padded[k, mask[k] == 1] = row[0]
    names = ("n", "x_sum", "y_sum", "x_sum/last")
    got = measure(model, layers, names, [{"input_ids": padded, "attention_mask": mask}])
    want = [measure(model, layers, names, [{"input_ids": row, "attention_mask": torch.ones_like(row)}]) for row in rows]
    for path in layers:
        for name in names:
            both = want[0][name][path] + want[1][name][path]
            assert error(got[name][path], both) < close * max(1.0, float(both.abs().max())) * 10, (name, path)


def test_positions_are_left_to_models_that_follow_the_mask_and_to_batches_that_give_them():
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **SMALL,
    )
    model = toy.seeded(lambda: transformers.Qwen3ForCausalLM(config)).eval()
    seen, mask = [], kept(4, 9, left=True)
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True)
    layer = {"q": model.model.layers[0].self_attn.q_proj}
    measure(model, layer, ["n"], [{"input_ids": ids(2, 9), "attention_mask": mask}])
    assert seen[-1] is None
    seen.clear()
    other = gpt2()
    other.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    measure(other, inside(other), ["n"], [{"input_ids": ids(2, 9), "attention_mask": mask, "position_ids": counted(mask)}])
    assert len(seen) == 1
    measure(other, inside(other), ["n"], [{"input_ids": ids(2, 9), "attention_mask": kept(4, 9)}])
    assert len(seen) == 2, "padding on the right costs no further call"
    assert counted(mask)[0].tolist() == [0] * 5 + [0, 1, 2, 3]


def test_model_whose_positions_cannot_be_given_is_named():
    class Absolute(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.o_proj = nn.Embedding(64, 16), nn.Embedding(32, 16), nn.Linear(16, 16)

        def forward(self, input_ids, attention_mask=None):
            return self.o_proj(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))

    model = toy.seeded(Absolute)
    with pytest.warns(ll.LoraLiteWarning, match=r"Absolute another output.*Pad calibration data on the right"):
        measure(model, {"l": model.o_proj}, ["n"], [{"input_ids": ids(2, 9), "attention_mask": kept(4, 9, left=True)}])


# --- what a batch calls its mask --------------------------------------------------------------------------------------


class Words(nn.Module):
    """Takes masks of several names and needs none, so that what is counted is what calibration understood."""

    def __init__(self):
        super().__init__()
        self.embed, self.o_proj = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None, mask=None, key_padding_mask=None, token_type_ids=None, labels=None):
        return self.o_proj(self.embed(input_ids))


class Unnamed(Words):
    def forward(self, *args):
        return super().forward(*args)


class Maskless(Words):
    def forward(self, x, valid=None):
        return super().forward(x)


IDS, MASK = ids(2, 9), kept(4, 9)
PAD = MASK == 0
TOLD = r"{} may say which tokens are padding and is not read as such.*\"attention_mask\": mask"


def counts(model, batches, say=None):
    """The number of tokens, and with it the one warning or none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ll.LoraLiteWarning)
        n = measure(model, {"l": model.o_proj}, ["n"], batches)["n"]["l"]
    messages = [str(w.message) for w in said if issubclass(w.category, ll.LoraLiteWarning)]
    assert len(messages) == (say is not None), messages
    assert say is None or re.search(say, messages[0]), messages
    return int(n)


@pytest.mark.parametrize(
    ("make", "batch", "tokens", "say"),
    [
        (Words, {"input_ids": IDS, "attention_mask": MASK}, 13, None),
        (Words, (IDS, MASK), 13, None),
        (Words, [IDS, MASK.bool()], 13, None),
        (Words, IDS, 18, None),
        (Words, {"input_ids": IDS, "attention_mask": MASK[:, None, None]}, 13, None),
        (Words, {"input_ids": IDS, "attention_mask": MASK[..., None]}, 13, None),
        (Words, {"input_ids": IDS, "key_padding_mask": PAD}, 13, None),
        (Words, {"input_ids": IDS, "key_padding_mask": torch.zeros(2, 9).masked_fill(PAD, -torch.inf)}, 13, None),
        (Words, {"input_ids": IDS, "key_padding_mask": PAD, "attention_mask": 1 - MASK}, 5, None),
        (Words, {"input_ids": IDS, "mask": MASK, "attention_mask": MASK}, 13, None),
        (Words, {"input_ids": IDS, "mask": torch.ones_like(MASK)}, 18, None),
        (Words, {"input_ids": IDS, "token_type_ids": MASK}, 18, None),
        (Words, {"input_ids": IDS, "labels": MASK}, 18, None),
        (Maskless, {"x": IDS, "attention_mask": MASK}, 13, None),
        (Maskless, MASK, 18, None),  # words of two letters
        (Words, {"input_ids": IDS, "mask": MASK}, 18, "mask"),
        (Words, (IDS, None, PAD), 18, "mask"),
        (Words, {"input_ids": IDS, "attention_mask": {"full_attention": PAD[:, None, None]}}, 18, "attention_mask"),
        (Maskless, {"x": IDS, "valid": MASK.float()}, 18, "valid"),
        (Maskless, [MASK, MASK], 18, "valid"),
        (Unnamed, (IDS, MASK), 18, r"batch\[1\]"),
    ],
)
def test_masks_are_read_by_position_and_by_names_with_one_meaning_and_others_are_named(make, batch, tokens, say):
    assert counts(toy.seeded(make), [batch, batch], say and TOLD.format(say)) == 2 * tokens


def test_a_loader_over_a_dataset_of_tensors_gives_masks_by_position_and_keeps_its_batches_for_the_users_loss():
    model, given = toy.seeded(Words), []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS, MASK), batch_size=1)

    def loss(model, batch):
        given.append(type(batch))
        return model(*batch).square().mean()

    assert counts(model, loader) == 13
    assert measure(model, {"l": model.o_proj}, ["wgrad", "n"], loader, loss)["n"]["l"] == 13
    assert set(given) == {tuple}


def test_rows_behind_padding_get_their_positions_also_when_batches_are_given_by_position():
    model, mask = gpt2("GPT2Model").eval(), kept(4, 9, left=True)
    order = list(inspect.signature(model.forward).parameters)
    batch = {"input_ids": IDS, "attention_mask": mask}
    by_position = tuple(batch.get(name) for name in order[: order.index("attention_mask") + 1])
    want, got = (measure(model, inside(model), ["x_sum", "n"], [one]) for one in (batch, by_position))
    assert all(torch.equal(got[name][path], want[name][path]) for name in ("x_sum", "n") for path in inside(model))
    assert set(map(int, got["n"].values())) == {13}


def test_a_padding_mask_of_other_numbers_is_refused():
    with pytest.raises(ll.LoraLiteError, match=r"calibration_data\[0\]: key_padding_mask holds numbers"):
        counts(Words(), [{"input_ids": IDS, "key_padding_mask": torch.full((2, 9), 0.5)}])


# --- torch's own transformer ------------------------------------------------------------------------------------------


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    return toy.seeded(lambda: nn.TransformerEncoder(layer, 1, enable_nested_tensor=batch_first)).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("left", [False, True], ids=["nested", "padding on the left"])
@pytest.mark.parametrize("first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("lengths", [(4, 9), (1, 2)], ids=["rows", "as many rows as tokens"])
def test_tokens_of_torchs_encoder_are_those_of_the_rows_alone(lengths, first, left):
    """With padding on the right it makes nested tensors, which hold the kept tokens."""
    model, mask = encoder(first), kept(*lengths, left=left)
    x = toy.inputs(2, max(lengths), 16)
    layers = {p: layer for p, layer in linears(model).items() if "linear" in p}
    turned = (lambda t: t) if first else (lambda t: t.transpose(0, 1))
    names = ("n", "x_sum", "y_moment", *(("x_sum/last", "n/last") if first else ()))
    got = measure(model, layers, names, [{"src": turned(x), "src_key_padding_mask": mask == 0}])
    alone = [measure(model, layers, names, [{"src": turned(x[k : k + 1, mask[k] == 1])}]) for k in (0, 1)]
    for path in layers:
        assert got["n"][path] == sum(lengths)
        for name in names:
            want = alone[0][name][path] + alone[1][name][path]
            assert error(got[name][path], want) < 1e-4 * max(1.0, float(want.abs().max())), (name, path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_methods_attach_to_torchs_encoder_on_padded_batches():
    data = [{"src": toy.inputs(3, 7, 16), "src_key_padding_mask": kept(5, 7, 6) == 0}]
    for name in ("corda", "eva"):
        assert len(ll.attach(encoder(), ll.config(name, r=2), data).layers) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_labels_and_last_tokens_of_nested_tensors():
    model, x = toy.one(4, 4), toy.inputs(2, 5, 4)
    parts = torch.nested.nested_tensor([x[0, :2], x[1]])
    labels = torch.tensor([[1, -100, -100, -100, -100], [-100, 2, -100, -100, 3]])

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = model.o_proj

        def forward(self, x, labels):
            return self.o_proj(parts).to_padded_tensor(0.0)

    got = measure(Inner(), {"l": model.o_proj}, ("x_sum", "x_sum/labels", "x_sum/last"), [{"x": x, "labels": labels}])
    want = {"": x[0, :2].sum(0) + x[1].sum(0), "/labels": x[0, 0] + x[1, 1] + x[1, 4], "/last": x[0, 1] + x[1, 4]}
    for position, rows in want.items():
        assert error(got[f"x_sum{position}"]["l"], rows.double()) < 1e-5, position
