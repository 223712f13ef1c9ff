"""Encoder-decoders and encoders with heads."""

from .decoders import BERT, IDS
from .row import Row

SEQ2SEQ = {"batch": "seq2seq"}
T5 = {
    "vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
STARTED = {**T5, "decoder_start_token_id": 0}
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, **IDS,
}  # fmt: skip

DISTIL = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0}

ENCODER_DECODER = [
    Row("t5", "Seq2SeqLM", STARTED, **SEQ2SEQ),
    Row("mt5", "Seq2SeqLM", STARTED, **SEQ2SEQ),
    Row("umt5", "Seq2SeqLM", STARTED, **SEQ2SEQ),
    Row("longt5", "Seq2SeqLM", STARTED, local_radius=4, encoder_attention_type="local", **SEQ2SEQ),
    Row("switch_transformers", "Seq2SeqLM", STARTED, num_decoder_layers=2, num_experts=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, **SEQ2SEQ),
    Row("bart", "Seq2SeqLM", BART, **SEQ2SEQ),
    Row("bart", "SequenceClassification", BART, name="bart_classifier", batch="ends"),
    Row("mbart", "Seq2SeqLM", BART, **SEQ2SEQ),
    Row("pegasus", "Seq2SeqLM", BART, **SEQ2SEQ),
    Row("marian", "Seq2SeqLM", BART, decoder_vocab_size=96, **SEQ2SEQ),
    Row("blenderbot", "Seq2SeqLM", BART, **SEQ2SEQ),
    Row("m2m_100", "Seq2SeqLM", BART, **SEQ2SEQ),
    Row("led", "Seq2SeqLM", BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=[8,
        8], **SEQ2SEQ),
]  # fmt: skip

ENCODER = [
    Row("bert", "MaskedLM", BERT),
    Row("bert", "SequenceClassification", BERT, name="bert_classifier", num_labels=3),
    Row("bert", "QuestionAnswering", BERT, name="bert_questions"),
    Row("roberta", "SequenceClassification", BERT, max_position_embeddings=64),
    Row("roberta", "MaskedLM", BERT, name="roberta_mlm", max_position_embeddings=64),
    Row("xlm-roberta", "TokenClassification", BERT, name="xlm_r", max_position_embeddings=64),
    Row("camembert", "MaskedLM", BERT, max_position_embeddings=64),
    Row("distilbert", "SequenceClassification", DISTIL),
    Row("distilbert", "MaskedLM", DISTIL, name="distilbert_mlm"),
    Row("deberta", "SequenceClassification", BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    Row("deberta-v2", "SequenceClassification", BERT, name="deberta_v2", relative_attention=True, pos_att_type=["c2p",
        "p2c"]),
    Row("electra", "SequenceClassification", BERT, embedding_size=16),
    Row("electra", "PreTraining", BERT, name="electra_discriminator", embedding_size=16),
    Row("modernbert", "MaskedLM", BERT),
    Row("albert", "MaskedLM", BERT, embedding_size=16),
    Row("mpnet", "MaskedLM", BERT),
    Row("convbert", "SequenceClassification", BERT, embedding_size=16, conv_kernel_size=3),
    Row("squeezebert", "SequenceClassification", BERT, embedding_size=32),
    Row("longformer", "MaskedLM", BERT, attention_window=[4, 4], max_position_embeddings=64),
    Row("funnel", "SequenceClassification", vocab_size=96, d_model=32, d_head=8, n_head=4, d_inner=48, block_sizes=[1, 1]),
    Row("fnet", "MaskedLM", vocab_size=96, hidden_size=32, num_hidden_layers=2, intermediate_size=48, **IDS),
    Row("roformer", "MaskedLM", BERT, embedding_size=32),
    Row("esm", "MaskedLM", BERT, max_position_embeddings=64, mask_token_id=3),
    Row("nomic_bert", "MaskedLM", BERT),
]  # fmt: skip
