"""Small random configurations of the common transformers; nothing is downloaded.

An entry names the model's class and the options of its configuration.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.zoo import transformers_inputs as inputs
from benchmarks.zoo.transformers_inputs import PIXELS, VOCABULARY, Keywords
from benchmarks.zoo.transformers_options import (
    BLIP_TEXT,
    CLIP,
    DECODER,
    DETR,
    GPT,
    GROUPED,
    IMAGE,
    LLAVA,
    SEQ2SEQ,
    SIZES,
    STAGES,
    SWIN,
    T5,
    TEXT,
    TOKENS,
    WAVE,
)


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        kind: "text", "encoder-decoder", "vision", "audio", "multimodal" or "other".
        model: Name of its class.
        inputs: Makes its keyword arguments.
        options: Of its configuration.
    """

    kind: str
    model: str
    inputs: Callable[[], Keywords]
    options: Mapping[str, Any] = field(default_factory=dict)


def build_model(name: str) -> tuple[nn.Module, Keywords]:
    """Build one with random weights.

    Args:
        name: A key of `MODELS`.

    Returns:
        The model and its keyword arguments.
    """
    entry = MODELS[name]
    kind: Any = getattr(importlib.import_module("transformers"), entry.model)
    options = copy.deepcopy(
        entry.options
    )  # some models write into the lists of their configuration
    return kind(kind.config_class(**options)), entry.inputs()


def _text(model: str, /, **options: Any) -> Entry:
    return Entry("text", model, inputs.text, {**TEXT, **options})


def _decoder(model: str, /, **options: Any) -> Entry:
    return Entry("text", model, inputs.text, {**GROUPED, **options})


def _seq2seq(model: str, /, **options: Any) -> Entry:
    return Entry("encoder-decoder", model, inputs.pair, {**SEQ2SEQ, **options})


def _vision(model: str, /, **options: Any) -> Entry:
    return Entry("vision", model, inputs.image, options)


def _audio(model: str, /, **options: Any) -> Entry:
    return Entry("audio", model, inputs.sound, {**WAVE, **options})


MODELS = {
    # text
    "bert": _text("BertForSequenceClassification"),
    "roberta": _text("RobertaForSequenceClassification"),
    "xlm_roberta": _text("XLMRobertaForTokenClassification"),
    "distilbert": Entry(
        "text",
        "DistilBertForSequenceClassification",
        inputs.text,
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "albert": _text("AlbertForSequenceClassification", embedding_size=16),
    "electra": _text("ElectraForPreTraining", embedding_size=16),
    "deberta": _text(
        "DebertaForSequenceClassification", relative_attention=True, pos_att_type="p2c|c2p"
    ),
    "deberta_v2": _text(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type="p2c|c2p"
    ),
    "mpnet": _text("MPNetForSequenceClassification"),
    "modernbert": _text("ModernBertForMaskedLM", **TOKENS, local_attention=8),
    "longformer": _text("LongformerModel", attention_window=4),
    "big_bird": _text("BigBirdModel", attention_type="original_full"),
    "fnet": Entry("text", "FNetModel", lambda: {"input_ids": inputs.text()["input_ids"]}, TEXT),
    "xlnet": Entry(
        "text",
        "XLNetLMHeadModel",
        inputs.text,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    ),
    "esm": _text("EsmModel", pad_token_id=1, position_embedding_type="rotary"),
    "gpt2": Entry("text", "GPT2LMHeadModel", inputs.text, GPT),
    "gpt_neo": _decoder(
        "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_neox": _text("GPTNeoXForCausalLM", **TOKENS),
    "gptj": Entry("text", "GPTJForCausalLM", inputs.text, {**GPT, "rotary_dim": 4}),
    "gpt_bigcode": Entry("text", "GPTBigCodeForCausalLM", inputs.text, GPT),
    "opt": _text("OPTForCausalLM", **TOKENS, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": Entry(
        "text",
        "BloomForCausalLM",
        inputs.text,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    ),
    "falcon": _text("FalconForCausalLM", **TOKENS),
    "mpt": Entry(
        "text",
        "MptForCausalLM",
        inputs.text,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 80},
    ),
    "llama": _decoder("LlamaForCausalLM"),
    "mistral": _decoder("MistralForCausalLM", sliding_window=8),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3ForCausalLM"),
    "gemma": _decoder("GemmaForCausalLM"),
    "gemma2": _decoder("Gemma2ForCausalLM", sliding_window=8),
    "gemma3": _decoder("Gemma3ForCausalLM", sliding_window=8),
    "phi": _text("PhiForCausalLM", **TOKENS),
    "phi3": _decoder("Phi3ForCausalLM"),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "cohere": _decoder("CohereForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM"),
    "granite": _decoder("GraniteForCausalLM"),
    "mixtral": _decoder("MixtralForCausalLM", num_local_experts=4),
    "qwen2_moe": _decoder(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "mamba": Entry(
        "text",
        "MambaForCausalLM",
        inputs.text,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    # encoder-decoder
    "t5": Entry("encoder-decoder", "T5ForConditionalGeneration", inputs.pair, T5),
    "mt5": Entry("encoder-decoder", "MT5ForConditionalGeneration", inputs.pair, T5),
    "bart": _seq2seq("BartForConditionalGeneration"),
    "mbart": _seq2seq("MBartForConditionalGeneration"),
    "pegasus": _seq2seq("PegasusForConditionalGeneration"),
    "marian": _seq2seq("MarianMTModel"),
    "m2m_100": _seq2seq("M2M100ForConditionalGeneration"),
    "blenderbot": _seq2seq("BlenderbotForConditionalGeneration"),
    "led": _seq2seq(
        "LEDForConditionalGeneration",
        attention_window=8,
        max_encoder_position_embeddings=80,
        max_decoder_position_embeddings=80,
    ),
    "prophetnet": Entry(
        "encoder-decoder",
        "ProphetNetForConditionalGeneration",
        inputs.pair,
        {
            **TOKENS,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "encoder_ffn_dim": 64,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "decoder_start_token_id": 2,
            "max_position_embeddings": 80,
        },
    ),
    # vision
    "vit": _vision("ViTForImageClassification", **IMAGE),
    "deit": _vision("DeiTForImageClassification", **IMAGE),
    "beit": _vision("BeitForImageClassification", **IMAGE, use_relative_position_bias=True),
    "dinov2": _vision("Dinov2ForImageClassification", **IMAGE),
    "swin": _vision("SwinForImageClassification", **SWIN),
    "swinv2": _vision("Swinv2ForImageClassification", **SWIN),
    "convnext": _vision("ConvNextForImageClassification", num_stages=2, **STAGES),
    "convnextv2": _vision("ConvNextV2ForImageClassification", num_stages=2, **STAGES),
    "resnet": _vision("ResNetForImageClassification", embedding_size=16, **STAGES),
    "regnet": _vision("RegNetForImageClassification", embedding_size=16, **STAGES, groups_width=8),
    "mobilenet_v2": _vision("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    "mobilevit": _vision(
        "MobileViTForImageClassification",
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48],
        num_attention_heads=4,
    ),
    "segformer": _vision(
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "poolformer": _vision(
        "PoolFormerForImageClassification",
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
    "focalnet": _vision(
        "FocalNetForImageClassification",
        image_size=PIXELS,
        patch_size=4,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "vit_mae": _vision(
        "ViTMAEForPreTraining",
        **IMAGE,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    "dpt": _vision(
        "DPTForDepthEstimation",
        **{**IMAGE, "num_hidden_layers": 4},
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
    "detr": _vision("DetrForObjectDetection", **DETR),
    "conditional_detr": _vision("ConditionalDetrForObjectDetection", **DETR),
    "yolos": _vision(
        "YolosForObjectDetection",
        **{**IMAGE, "image_size": [PIXELS, PIXELS]},
        num_detection_tokens=5,
    ),
    "upernet": _vision(
        "UperNetForSemanticSegmentation",
        hidden_size=16,
        auxiliary_in_channels=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        backbone_config={
            "model_type": "convnext",
            "num_stages": 2,
            **STAGES,
            "out_features": ["stage1", "stage2"],
        },
    ),
    "videomae": Entry(
        "vision", "VideoMAEForVideoClassification", inputs.video, {**IMAGE, "num_frames": 4}
    ),
    "timesformer": Entry(
        "vision", "TimesformerForVideoClassification", inputs.video, {**IMAGE, "num_frames": 4}
    ),
    "vivit": Entry(
        "vision",
        "VivitForVideoClassification",
        inputs.video,
        {**IMAGE, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    ),
    # audio
    "whisper": Entry(
        "audio",
        "WhisperForConditionalGeneration",
        inputs.mels,
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 40},
    ),
    "wav2vec2": _audio("Wav2Vec2ForCTC"),
    "wav2vec2_conformer": _audio("Wav2Vec2ConformerForCTC"),
    "hubert": _audio("HubertForCTC"),
    "wavlm": _audio("WavLMForSequenceClassification"),
    "unispeech": _audio("UniSpeechForSequenceClassification"),
    "audio_spectrogram_transformer": Entry(
        "audio",
        "ASTForAudioClassification",
        inputs.spectrogram,
        {
            **SIZES,
            "max_length": 64,
            "num_mel_bins": 16,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
        },
    ),
    "speech_to_text": Entry(
        "audio",
        "Speech2TextForConditionalGeneration",
        inputs.speech_frames,
        {
            **SEQ2SEQ,
            "input_feat_per_channel": 16,
            "input_channels": 1,
            "conv_channels": 16,
            "max_source_positions": 80,
            "max_target_positions": 80,
        },
    ),
    "speecht5": Entry(
        "audio",
        "SpeechT5ForSpeechToText",
        inputs.speech_to_text,
        {**WAVE, **SEQ2SEQ, "max_speech_positions": 80, "max_text_positions": 80},
    ),
    # multimodal
    "clip": Entry("multimodal", "CLIPModel", inputs.caption, CLIP),
    "siglip": Entry(
        "multimodal",
        "SiglipModel",
        inputs.caption,
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": IMAGE},
    ),
    "chinese_clip": Entry("multimodal", "ChineseCLIPModel", inputs.caption, CLIP),
    "blip": Entry(
        "multimodal",
        "BlipForConditionalGeneration",
        inputs.caption,
        {"text_config": BLIP_TEXT, "vision_config": IMAGE, "projection_dim": 16},
    ),
    "vilt": Entry(
        "multimodal",
        "ViltModel",
        inputs.vilt,
        {**TEXT, "image_size": PIXELS, "patch_size": 8, "max_image_length": 16},
    ),
    "visual_bert": Entry(
        "multimodal", "VisualBertModel", inputs.visual_bert, {**TEXT, "visual_embedding_dim": 24}
    ),
    "lxmert": Entry(
        "multimodal",
        "LxmertModel",
        inputs.lxmert,
        {**TEXT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 24},
    ),
    "layoutlm": Entry("multimodal", "LayoutLMForTokenClassification", inputs.layout, TEXT),
    "git": Entry(
        "multimodal", "GitForCausalLM", inputs.caption, {**DECODER, "vision_config": IMAGE}
    ),
    "llava": Entry("multimodal", "LlavaForConditionalGeneration", inputs.llava, LLAVA),
    "owlvit": Entry("multimodal", "OwlViTModel", inputs.caption, CLIP),
    # other
    "patchtst": Entry(
        "other",
        "PatchTSTForPrediction",
        inputs.series,
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "prediction_length": 8,
        },
    ),
}
