"""Options of small configurations that several transformers share."""

from benchmarks.zoo.transformers_inputs import PIXELS, VOCABULARY

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 80}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **TOKENS}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZES, "image_size": PIXELS, "patch_size": 8}
SEQ2SEQ = {
    **TOKENS,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 80,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WAVE = {
    **SIZES, "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 32, "mask_time_length": 2,
    "classifier_proj_size": 16,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2]}
SWIN = {"image_size": PIXELS, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}  # fmt: skip
RESNET = {"embedding_size": 16, **STAGES, "out_features": ["stage2"]}
CLIP_TEXT = {**DECODER, "projection_dim": 16}
CLIP_IMAGE = {**IMAGE, "projection_dim": 16}
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 16}
BLIP_TEXT = {**DECODER, "encoder_hidden_size": 32}
LLAVA = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {**CLIP_IMAGE, "model_type": "clip_vision_model"},
    "image_token_index": 3,
}
DETR_BACKBONE = {"model_type": "resnet", **RESNET}
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "num_queries": 5, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "backbone_config": DETR_BACKBONE,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    **DECODER, **ROUTED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CROSS = {**DECODER, "model_type": "bert", "is_decoder": True, "add_cross_attention": True}
SERIES = {
    "prediction_length": 8, "context_length": 32, "lags_sequence": [1, 2, 8],
    "num_time_features": 2, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}  # fmt: skip
