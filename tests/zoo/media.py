"""Vision, audio, vision with language, and time series."""

from .decoders import IDS, LLAMA
from .row import Row

BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT = {**BODY, "image_size": 32, "patch_size": 16}
PIXELS = {"batch": "pixels"}
STAGES = {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}
WAV = {
    **BODY, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 96, **IDS,
}  # fmt: skip
TOWER_TEXT = {**BODY, "vocab_size": 96, "max_position_embeddings": 64, **IDS}
CLIP = {**VIT, "model_type": "clip_vision_model"}
SIGLIP = {**VIT, "model_type": "siglip_vision_model"}
LLAMA_TEXT = {**LLAMA, "model_type": "llama"}
GEMMA_TEXT = {**LLAMA, "model_type": "gemma", "head_dim": 8}
SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_time_features": 1,
}  # fmt: skip
PATCHES = {
    "context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4, "num_input_channels": 2,
    "d_model": 16,
}  # fmt: skip
QWEN_TEXT = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
QWEN_TOKENS = {"image_token_id": 95, "vision_start_token_id": 93, "vision_end_token_id": 94}

VISION_ONLY = [
    Row("vit", "ImageClassification", VIT, **PIXELS),
    Row("deit", "DeiTForImageClassification", VIT, **PIXELS),
    Row("beit", "ImageClassification", VIT, vocab_size=96, **PIXELS),
    Row("swin", "ImageClassification", STAGES, **PIXELS),
    Row("swinv2", "ImageClassification", STAGES, **PIXELS),
    Row("convnext", "ImageClassification", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], layer_scale_init_value=1.0,
        **PIXELS),
    Row("dinov2", "ImageClassification", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
        image_size=32, patch_size=16, **PIXELS),
    Row("dinov3_vit", "Model", VIT, **PIXELS),
    Row("vit_mae", "PreTraining", VIT, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=24, mask_ratio=0.5, batch="masked pixels"),
    Row("segformer", "ImageClassification", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], **PIXELS),
    Row("mobilevit", "ImageClassification", hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8, 8, 16, 16, 20, 24, 32],
        num_attention_heads=2, image_size=32, output_stride=8, initializer_range=0.2, **PIXELS),
    Row("resnet", "ImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        **PIXELS),
    Row("yolos", "ObjectDetection", VIT, image_size=[32, 32], num_detection_tokens=4, **PIXELS),
]  # fmt: skip

AUDIO = [
    Row("whisper", "SpeechSeq2Seq", vocab_size=96, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        batch="spectrogram", **IDS),
    Row("wav2vec2", "CTC", WAV, apply_spec_augment=False, batch="waveform"),
    Row("hubert", "CTC", WAV, apply_spec_augment=False, batch="waveform"),
    Row("wavlm", "CTC", WAV, apply_spec_augment=False, batch="waveform"),
    Row("data2vec-audio", "Model", {**WAV, "num_conv_pos_embeddings": 2}, name="data2vec_audio", conv_pos_kernel_size=3,
        mask_time_prob=0.0, batch="waveform"),
    Row("wav2vec2-bert", "Model", BODY, name="wav2vec2_bert", feature_projection_input_dim=8, apply_spec_augment=False,
        vocab_size=96, batch="frames"),
    Row("audio-spectrogram-transformer", "AudioClassification", BODY, name="ast", max_length=24, num_mel_bins=16, patch_size=8,
        frequency_stride=8, time_stride=8, batch="spectral values"),
]  # fmt: skip

VISION_LANGUAGE = [
    Row("clip", "Model", text_config=TOWER_TEXT, vision_config=VIT, projection_dim=16, batch="text and image"),
    Row("siglip", "Model", text_config={**TOWER_TEXT, "max_position_embeddings": 16}, vision_config=VIT,
        batch="text and image"),
    Row("paligemma", "ImageTextToText", text_config=GEMMA_TEXT, vision_config=SIGLIP, projection_dim=32, image_token_index=95,
        batch="tokens and types"),
    Row("llava", "ImageTextToText", text_config=LLAMA_TEXT, vision_config=CLIP, image_token_index=95, vision_feature_layer=-1,
        batch="image in text"),
    Row("gemma3", "ImageTextToText", text_config={**GEMMA_TEXT, "model_type": "gemma3_text"}, vision_config=SIGLIP,
        mm_tokens_per_image=4, image_token_index=95, batch="image in text"),
    Row("smolvlm", "ImageTextToText", text_config=LLAMA_TEXT, vision_config=VIT, image_token_id=95, scale_factor=2,
        batch="merged image in text"),
    Row("qwen2_vl", "ImageTextToText", QWEN_TOKENS, text_config=QWEN_TEXT, batch="patches", vision_config={**QWEN_VISION,
        "embed_dim": 32, "mlp_ratio": 2}),
    Row("qwen2_5_vl", "ImageTextToText", QWEN_TOKENS, text_config=QWEN_TEXT, batch="patches", vision_config={**QWEN_VISION,
        "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}),
    Row("blip", "ImageTextToText", text_config={**TOWER_TEXT, "encoder_hidden_size": 32}, vision_config=VIT,
        batch="text and image"),
    Row("vilt", "Model", {**VIT, "vocab_size": 96, "max_position_embeddings": 64}, batch="text and image"),
    Row("git", "CausalLM", TOWER_TEXT, vision_config=VIT, batch="text and image"),
]  # fmt: skip

TIME_SERIES = [
    Row("patchtst", "PatchTSTForPrediction", PATCHES, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, batch="series"),
    Row("patchtsmixer", "PatchTSMixerForPrediction", PATCHES, num_layers=2, batch="series"),
    Row("time_series_transformer", "TimeSeriesTransformerForPrediction", SERIES, batch="lagged series"),
    Row("informer", "InformerForPrediction", SERIES, batch="lagged series"),
    Row("autoformer", "AutoformerForPrediction", SERIES, label_length=2, moving_average=3, batch="lagged series"),
]  # fmt: skip
