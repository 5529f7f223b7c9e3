"""Small configurations of transformers: encoders with decoders."""

from benchmarks.zoo import transformers_inputs as inputs
from benchmarks.zoo.transformers_entries import Entry, seq2seq
from benchmarks.zoo.transformers_inputs import VOCABULARY
from benchmarks.zoo.transformers_options import CROSS, T5, TEXT, TOKENS

PAIRS = {
    "t5": Entry("encoder-decoder", "T5ForConditionalGeneration", inputs.pair, T5),
    "mt5": Entry("encoder-decoder", "MT5ForConditionalGeneration", inputs.pair, T5),
    "bart": seq2seq("BartForConditionalGeneration"),
    "mbart": seq2seq("MBartForConditionalGeneration"),
    "pegasus": seq2seq("PegasusForConditionalGeneration"),
    "marian": seq2seq("MarianMTModel"),
    "m2m_100": seq2seq("M2M100ForConditionalGeneration"),
    "blenderbot": seq2seq("BlenderbotForConditionalGeneration"),
    "led": seq2seq(
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
    "longt5": Entry(
        "encoder-decoder", "LongT5ForConditionalGeneration", inputs.pair, {**T5, "local_radius": 4}
    ),
    "umt5": Entry("encoder-decoder", "UMT5ForConditionalGeneration", inputs.pair, T5),
    "switch_transformers": Entry(
        "encoder-decoder",
        "SwitchTransformersForConditionalGeneration",
        inputs.pair,
        {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "bigbird_pegasus": seq2seq(
        "BigBirdPegasusForConditionalGeneration", attention_type="original_full"
    ),
    "pegasus_x": seq2seq("PegasusXForConditionalGeneration", block_size=8, num_global_tokens=4),
    "plbart": seq2seq("PLBartForConditionalGeneration"),
    "blenderbot_small": seq2seq("BlenderbotSmallForConditionalGeneration"),
    "nllb_moe": seq2seq(
        "NllbMoeForConditionalGeneration",
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    "fsmt": seq2seq(
        "FSMTForConditionalGeneration", langs=["en", "de"], src_vocab_size=120, tgt_vocab_size=120
    ),
    "mvp": seq2seq("MvpForConditionalGeneration"),
    "encoder_decoder": Entry(
        "encoder-decoder",
        "EncoderDecoderModel",
        inputs.pair,
        {
            "encoder": {**TEXT, "model_type": "bert"},
            "decoder": CROSS,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
}
