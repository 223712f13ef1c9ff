"""Decoder-only language models of the zoo: dense, with experts, and those that carry a state instead of attending to all."""

from .row import Row

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BARE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, **IDS}
BERT = {**BARE, "intermediate_size": 48, "num_attention_heads": 4}
LLAMA = {**BERT, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
TOP2 = {"num_experts_per_tok": 2}
EXPERTS = {**TOP2, "num_experts": 4, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {
    **LLAMA, **TOP2, **MLA, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

DENSE = [
    Row("llama", "CausalLM", LLAMA),
    Row("llama", "SequenceClassification", LLAMA, name="llama_classifier"),
    Row("mistral", "CausalLM", LLAMA, head_dim=8),
    Row("qwen2", "CausalLM", LLAMA),
    Row("qwen3", "CausalLM", LLAMA, head_dim=8, tie_word_embeddings=True),
    Row("gemma", "CausalLM", LLAMA, head_dim=8),
    Row("gemma2", "CausalLM", LLAMA, head_dim=8),
    Row("gemma3_text", "CausalLM", LLAMA, head_dim=8),
    Row("gemma3n_text", "CausalLM", LLAMA, head_dim=8, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
        laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0], altup_num_inputs=2),
    Row("phi", "CausalLM", LLAMA, num_key_value_heads=4),
    Row("phi3", "CausalLM", LLAMA),
    Row("gpt2", "CausalLM", GPT2),
    Row("gpt_bigcode", "CausalLM", GPT2),
    Row("gptj", "CausalLM", GPT2, rotary_dim=4),
    Row("codegen", "CausalLM", GPT2, rotary_dim=4),
    Row("gpt_neo", "CausalLM", vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
        max_position_embeddings=64, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2),
    Row("gpt_neox", "CausalLM", BERT),
    Row("opt", "CausalLM", vocab_size=96, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    Row("bloom", "CausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **IDS),
    Row("falcon", "CausalLM", BARE, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
    Row("mpt", "CausalLM", vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    Row("starcoder2", "CausalLM", LLAMA),
    Row("stablelm", "CausalLM", LLAMA),
    Row("cohere", "CausalLM", LLAMA),
    Row("cohere2", "CausalLM", LLAMA),
    Row("olmo", "CausalLM", LLAMA),
    Row("olmo2", "CausalLM", LLAMA),
    Row("olmo3", "CausalLM", LLAMA),
    Row("granite", "CausalLM", LLAMA),
    Row("smollm3", "CausalLM", LLAMA),
    Row("glm4", "CausalLM", LLAMA, head_dim=8),
    Row("nemotron", "CausalLM", LLAMA, head_dim=8),
    Row("exaone4", "CausalLM", LLAMA),
    Row("ernie4_5", "CausalLM", LLAMA, head_dim=8),
    Row("helium", "CausalLM", LLAMA, head_dim=8),
    Row("seed_oss", "CausalLM", LLAMA, head_dim=8),
    Row("bitnet", "CausalLM", LLAMA),
    Row("xglm", "CausalLM", vocab_size=96, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64,
        **IDS),
    Row("modernbert-decoder", "CausalLM", BERT),
]  # fmt: skip

EXPERT = [
    Row("mixtral", "CausalLM", LLAMA, TOP2, num_local_experts=4),
    Row("qwen2_moe", "CausalLM", LLAMA, EXPERTS, shared_expert_intermediate_size=24),
    Row("qwen3_moe", "CausalLM", LLAMA, EXPERTS),
    Row("deepseek_v2", "CausalLM", DEEPSEEK),
    Row("deepseek_v3", "CausalLM", DEEPSEEK),
    Row("gpt_oss", "CausalLM", LLAMA, TOP2, num_local_experts=4, head_dim=8),
    Row("phimoe", "CausalLM", LLAMA, TOP2, num_local_experts=4),
    Row("llama4_text", "CausalLM", LLAMA, num_local_experts=4, intermediate_size_mlp=48, head_dim=8,
        interleave_moe_layer_step=2),
    Row("jamba", "CausalLM", LLAMA, TOP2, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    Row("olmoe", "CausalLM", LLAMA, TOP2, num_experts=4),
    Row("flex_olmo", "CausalLM", LLAMA, TOP2, num_experts=4),
    Row("dbrx", "CausalLM", vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"kv_n_heads": 2,
        "rope_theta": 1e4, "clip_qkv": 8}, ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}),
    Row("granitemoe", "CausalLM", LLAMA, TOP2, num_local_experts=4),
    Row("granitemoeshared", "CausalLM", LLAMA, TOP2, num_local_experts=4, shared_intermediate_size=24),
    Row("jetmoe", "CausalLM", BARE, TOP2, intermediate_size=48, num_key_value_heads=2, kv_channels=8, num_local_experts=4),
    Row("ernie4_5_moe", "CausalLM", LLAMA, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1),
    Row("glm4_moe", "CausalLM", LLAMA, TOP2, n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=1),
    Row("dots1", "CausalLM", LLAMA, TOP2, n_routed_experts=4, moe_intermediate_size=16, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1),
    Row("hunyuan_v1_moe", "CausalLM", LLAMA, head_dim=8, num_experts=4, moe_topk=2),
    Row("minimax", "CausalLM", LLAMA, TOP2, head_dim=8, num_local_experts=4, block_size=8),
    Row("lfm2_moe", "CausalLM", LLAMA, EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"]),
]  # fmt: skip

STATE = [
    Row("mamba", "CausalLM", BARE, state_size=4, expand=2, time_step_rank=4),
    Row("mamba2", "CausalLM", BARE, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    Row("falcon_mamba", "CausalLM", BARE, state_size=4, time_step_rank=4),
    Row("rwkv", "CausalLM", vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48,
        bos_token_id=1, eos_token_id=2),
    Row("recurrent_gemma", "CausalLM", LLAMA, lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"]),
    Row("qwen3_next", "CausalLM", LLAMA, EXPERTS, LINEAR_ATTENTION, head_dim=8, shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"]),
    Row("qwen3_5_text", "CausalLM", LLAMA, LINEAR_ATTENTION, head_dim=8, layer_types=["linear_attention", "full_attention"]),
    Row("bamba", "CausalLM", LLAMA, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8,
        attn_layer_indices=[1]),
    Row("falcon_h1", "CausalLM", LLAMA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
    Row("zamba2", "CausalLM", LLAMA, num_hidden_layers=3, mamba_d_state=8, n_mamba_heads=4, chunk_size=8, num_mem_blocks=1,
        layers_block_type=["mamba", "mamba", "hybrid"], adapter_rank=4),
    Row("granitemoehybrid", "CausalLM", LLAMA, TOP2, num_local_experts=4, shared_intermediate_size=24, mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8, layer_types=["mamba", "attention"]),
    Row("lfm2", "CausalLM", LLAMA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    Row("xlstm", "CausalLM", vocab_size=96, hidden_size=64, num_hidden_layers=2, num_blocks=2, num_heads=2, chunk_size=16,
        qk_dim_factor=1.0, **IDS),
]  # fmt: skip
