"""The models of other libraries, by package.

No tensor is made while this is imported: it would lie on the device of the first model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aim_surgery.capture import Inputs
from benchmarks.zoo.others import Entry, at_times, floats, image, tokens


def _graph() -> Inputs:
    return torch.randn(4, 8), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])


def _image_and_text() -> Inputs:
    return torch.randn(2, 3, 64, 64), torch.randint(1, 99, (2, 16))


def _ragged_images() -> Inputs:
    return ([[torch.randn(3, 32, 32), torch.randn(3, 32, 48)], [torch.randn(3, 16, 16)]],)


# segmentation_models_pytorch ----------------------------------------------------------------


def _segmenter(name: str, encoder: str = "resnet18", size: int = 128, **options: Any) -> Entry:
    options = {"encoder_weights": None, "classes": 3, **options}
    return Entry(f"segmentation_models_pytorch:{name}", image(size), options, (encoder,))


SEGMENTATION = {
    **{
        f"smp:{name}": _segmenter(name)
        for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3",
                     "DeepLabV3Plus", "PAN", "UPerNet", "Segformer")
    },
    "smp:DPT": _segmenter("DPT", "tu-vit_tiny_patch16_224", 224),
    "smp:Unet.mit_b0": _segmenter("Unet", "mit_b0", 64),
    "smp:Unet.mobilenet": _segmenter("Unet", "timm-mobilenetv3_small_075", 64),
    "smp:Unet.scse": _segmenter(
        "Unet", size=64, decoder_attention_type="scse",
        aux_params={"classes": 4, "dropout": 0.2},
    ),
}  # fmt: skip

# diffusers ----------------------------------------------------------------------------------

_STAGES = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
_CROSSED = {
    **_STAGES,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24, "attention_head_dim": 8,
}  # fmt: skip


def _joint() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 4]),
        "encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16),
    }  # fmt: skip


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4), "timestep": torch.tensor([0.3, 0.4]),
        "encoder_hidden_states": torch.randn(2, 6, 32), "pooled_projections": torch.randn(2, 32),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip


def _of_classes() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 4]),
            "class_labels": torch.tensor([1, 2])}  # fmt: skip


def _prior() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 8), "timestep": torch.tensor([1, 2]),
            "proj_embedding": torch.randn(2, 8),
            "encoder_hidden_states": torch.randn(2, 7, 8)}  # fmt: skip


DIFFUSION = {
    "diffusers:UNet2DModel": Entry("diffusers:UNet2DModel", at_times((2, 3, 32, 32)), {
        **_STAGES, "sample_size": 32, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}),
    "diffusers:UNet2DConditionModel": Entry(
        "diffusers:UNet2DConditionModel", at_times((2, 4, 16, 16), (2, 5, 24)),
        {**_CROSSED, "sample_size": 16, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}),
    "diffusers:ControlNetModel": Entry(
        "diffusers:ControlNetModel", at_times((2, 4, 16, 16), (2, 5, 24), (2, 3, 32, 32)),
        {**_CROSSED, "conditioning_embedding_out_channels": (16, 32)}),
    "diffusers:AutoencoderKL": Entry("diffusers:AutoencoderKL", image(32), {
        "block_out_channels": (32,), "norm_num_groups": 8, "sample_size": 32}),
    "diffusers:VQModel": Entry("diffusers:VQModel", image(16), {
        "block_out_channels": (32,), "norm_num_groups": 8}),
    "diffusers:DiT": Entry("diffusers:DiTTransformer2DModel", _of_classes, {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
        "sample_size": 8, "norm_num_groups": 4, "num_embeds_ada_norm": 10}),
    "diffusers:SD3": Entry("diffusers:SD3Transformer2DModel", _joint, {
        "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
        "pooled_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 16}),
    "diffusers:Flux": Entry("diffusers:FluxTransformer2DModel", _flux, {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8)}),
    "diffusers:PriorTransformer": Entry("diffusers:PriorTransformer", _prior, {
        "num_attention_heads": 2, "attention_head_dim": 4, "embedding_dim": 8, "num_layers": 2,
        "num_embeddings": 7}),
}  # fmt: skip

# vit_pytorch --------------------------------------------------------------------------------

_VIT = {"image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2,
        "mlp_dim": 32}  # fmt: skip
_PATCHES = {key: _VIT[key] for key in ("image_size", "patch_size", "num_classes", "dim")}
_PYRAMID = {"num_classes": 5, "dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)}
_CLIPS = {**_VIT, "image_size": 32, "frames": 4, "frame_patch_size": 2}
del _CLIPS["patch_size"]


def _vit(name: str, inputs: Any = None, /, **options: Any) -> Entry:
    return Entry(f"vit_pytorch.{name}", inputs or image(64), options)


VISION_TRANSFORMERS = {
    "vit_pytorch:ViT": Entry("vit_pytorch:ViT", image(64), _VIT),
    **{f"vit_pytorch:{name.partition(':')[0]}": _vit(name, **_VIT)
       for name in ("simple_vit:SimpleViT", "vit_for_small_dataset:ViT", "deepvit:DeepViT",
                    "learnable_memory_vit:ViT", "rvt:RvT")},
    "vit_pytorch:cait": _vit("cait:CaiT", **_VIT, cls_depth=1, layer_dropout=0.05),
    "vit_pytorch:xcit": _vit("xcit:XCiT", **_VIT, cls_depth=1),
    "vit_pytorch:t2t": _vit("t2t:T2TViT", image_size=64, num_classes=5, dim=32, depth=1, heads=2,
                            mlp_dim=32, t2t_layers=((7, 4), (3, 2))),
    "vit_pytorch:cct": _vit("cct:CCT", img_size=(64, 64), embedding_dim=32, n_conv_layers=2,
                            kernel_size=3, stride=2, padding=1, pooling_kernel_size=3,
                            pooling_stride=2, pooling_padding=1, num_layers=2, num_heads=2,
                            mlp_ratio=2.0, num_classes=5, positional_embedding="learnable"),
    "vit_pytorch:cross_vit": _vit("cross_vit:CrossViT", image_size=64, num_classes=5, depth=1,
                                  sm_dim=16, sm_patch_size=8, sm_enc_depth=1, sm_enc_heads=2,
                                  sm_enc_mlp_dim=32, lg_dim=32, lg_patch_size=16, lg_enc_depth=1,
                                  lg_enc_heads=2, lg_enc_mlp_dim=32, cross_attn_depth=1,
                                  cross_attn_heads=2),
    "vit_pytorch:pit": _vit("pit:PiT", image_size=64, patch_size=8, dim=32, num_classes=5,
                            depth=(1, 1), heads=2, mlp_dim=32),
    "vit_pytorch:levit": _vit("levit:LeViT", image_size=64, num_classes=5, stages=2,
                              dim=(16, 32), depth=1, heads=(2, 2), mlp_mult=2),
    "vit_pytorch:cvt": _vit("cvt:CvT", num_classes=5, s1_emb_dim=16, s2_emb_dim=16, s2_heads=2,
                            s3_emb_dim=32, s3_heads=2, s3_depth=1),
    "vit_pytorch:twins_svt": _vit("twins_svt:TwinsSVT", image(224, batch=1), num_classes=5,
                                  s1_emb_dim=16, s2_emb_dim=16, s3_emb_dim=16, s4_emb_dim=16,
                                  s3_depth=1),
    "vit_pytorch:regionvit": _vit("regionvit:RegionViT", image(224, batch=1), **_PYRAMID),
    "vit_pytorch:scalable_vit": _vit(
        "scalable_vit:ScalableViT", image(256, batch=1), num_classes=5, dim=16,
        heads=(1, 2, 2, 2), depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8),
        reduction_factor=(8, 4, 2, 1), window_size=(64, 32, None, None)),
    "vit_pytorch:max_vit": _vit("max_vit:MaxViT", image(224, batch=1), num_classes=5,
                                dim_conv_stem=16, dim=32, dim_head=16, depth=(1, 1),
                                window_size=7),
    "vit_pytorch:nest": _vit("nest:NesT", image_size=64, patch_size=4, dim=16, heads=2,
                             num_hierarchies=3, block_repeats=(1, 1, 1), num_classes=5),
    "vit_pytorch:sep_vit": _vit("sep_vit:SepViT", image(224, batch=1), num_classes=5, dim=16,
                                dim_head=8, heads=(1, 1, 2, 2), depth=(1, 1, 1, 1),
                                window_size=7),
    "vit_pytorch:vit_3d": _vit("vit_3d:ViT", floats((2, 3, 4, 32, 32)), **_CLIPS,
                               image_patch_size=8),
    "vit_pytorch:parallel_vit": _vit("parallel_vit:ViT", **_VIT, num_parallel_branches=2),
    "vit_pytorch:ats_vit": _vit("ats_vit:ViT", **_VIT, max_tokens_per_depth=(8, 4)),
    "vit_pytorch:patch_merger": _vit("vit_with_patch_merger:ViT", **_VIT, patch_merge_layer=1,
                                     patch_merge_num_tokens=4),
    "vit_pytorch:na_vit": _vit("na_vit:NaViT", _ragged_images, **_VIT),
    "vit_pytorch:look_vit": _vit("look_vit:LookViT", **_PATCHES, depth=1, heads=2, mlp_factor=2,
                                 dim_head=8, highres_patch_size=8, highres_mlp_factor=2,
                                 cross_attn_heads=2, cross_attn_dim_head=8,
                                 patch_conv_kernel_size=7),
}  # fmt: skip

# monai --------------------------------------------------------------------------------------

_VOLUME = floats((1, 1, 32, 32, 32))
_MAPS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def _monai(name: str, inputs: Any, /, *args: Any, **options: Any) -> Entry:
    return Entry(f"monai.networks.nets:{name}", inputs, options, args)


MEDICAL = {
    "monai:UNet": _monai("UNet", _VOLUME, spatial_dims=3, in_channels=1, out_channels=2,
                         channels=(4, 8, 16), strides=(2, 2), num_res_units=2),
    "monai:UNETR": _monai("UNETR", _VOLUME, in_channels=1, out_channels=2, img_size=(32, 32, 32),
                          feature_size=4, hidden_size=48, mlp_dim=64, num_heads=4),
    "monai:SegResNet": _monai("SegResNet", _VOLUME, in_channels=1, out_channels=2),
    "monai:DynUNet": _monai("DynUNet", _VOLUME, 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]),
    "monai:VNet": _monai("VNet", _VOLUME),
    "monai:HighResNet": _monai("HighResNet", _VOLUME, spatial_dims=3, in_channels=1,
                               out_channels=2),
    "monai:AttentionUnet": _monai("AttentionUnet", image(32, 1), **_MAPS, channels=(4, 8, 16),
                                  strides=(2, 2)),
    "monai:BasicUNetPlusPlus": _monai("BasicUNetPlusPlus", image(32, 1), spatial_dims=2,
                                      features=(8, 8, 16, 16, 32, 8)),
    "monai:AutoEncoder": _monai("AutoEncoder", image(32, 1), **_MAPS, channels=(4, 8),
                                strides=(2, 2)),
    "monai:VarAutoEncoder": _monai("VarAutoEncoder", image(32, 1), spatial_dims=2,
                                   in_shape=(1, 32, 32), out_channels=1, latent_size=4,
                                   channels=(4, 8), strides=(2, 2)),
    "monai:DiffusionModelUNet": _monai("DiffusionModelUNet", at_times((2, 1, 16, 16)),
                                       spatial_dims=2, in_channels=1, out_channels=1,
                                       channels=(8, 16), attention_levels=(False, True),
                                       num_res_blocks=1, num_head_channels=8, norm_num_groups=8),
    "monai:AHNet": _monai("AHNet", image(128, 1), **_MAPS, upsample_mode="nearest"),
    "monai:EfficientNetBN": _monai("EfficientNetBN", image(64), "efficientnet-b0",
                                   pretrained=False, spatial_dims=2, in_channels=3, num_classes=3),
    "monai:MILModel": _monai("MILModel", floats((2, 3, 3, 64, 64)), num_classes=3,
                             pretrained=False, mil_mode="att_trans"),
}  # fmt: skip

# Text, tables, graphs, sound ----------------------------------------------------------------

_LAYERS = {"dim": 32, "depth": 2, "heads": 2}


def _x_transformer(layers: str, **options: Any) -> nn.Module:
    import x_transformers as x  # pyright: ignore[reportMissingImports]

    attention = getattr(x, layers)(**_LAYERS, attn_dim_head=16, **options)
    return x.TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=attention)


def _here(make: Any, inputs: Any, /, *args: Any, **options: Any) -> Entry:
    return Entry(f"{__name__}:{make.__name__}", inputs, options, args)


def _diffusion_loss() -> nn.Module:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # pyright: ignore[reportMissingImports]

    unet = Unet(dim=16, dim_mults=(1, 2), flash_attn=False)
    return GaussianDiffusion(unet, image_size=16, timesteps=10)


def _mamba() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig  # pyright: ignore[reportMissingImports]

    return Mamba(MambaConfig(d_model=16, n_layers=2))


def _tabnet() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNet  # pyright: ignore[reportMissingImports]

    return TabNet(8, 3, group_attention_matrix=torch.eye(8))


def _yolo(name: str) -> nn.Module:
    from ultralytics import YOLO  # pyright: ignore[reportMissingImports]

    model: Any = YOLO(f"{name}.yaml", verbose=False).model
    return model


def _pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model  # pyright: ignore[reportMissingImports]

    return get_model(name, pretrained=False)


_CLIP = {"embed_dim": 32, "text_cfg": {
    "context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}}  # fmt: skip
_PAIRED = {"num_tokens": 100, "depth": 1, "heads": 2, "max_seq_len": 32}
_GRAPHS = {"in_channels": 8, "hidden_channels": 16, "num_layers": 2, "out_channels": 3}
_PERCEIVER = {"depth": 2, "num_latents": 8, "latent_dim": 16, "latent_heads": 2,
              "cross_dim_head": 8, "latent_dim_head": 8}  # fmt: skip

REST = {
    "x_transformers:decoder": _here(_x_transformer, tokens(16), "Decoder"),
    "x_transformers:encoder": _here(_x_transformer, tokens(16), "Encoder", rotary_pos_emb=True,
                                    ff_glu=True, ff_swish=True, use_rmsnorm=True),
    "x_transformers:flash": _here(_x_transformer, tokens(16), "Decoder", attn_flash=True,
                                  attn_kv_heads=1),
    "x_transformers:alibi": _here(_x_transformer, tokens(16), "Decoder", alibi_pos_bias=True,
                                  attn_pre_talking_heads=True),
    "x_transformers:XTransformer": Entry("x_transformers:XTransformer", tokens(16, times=2), {
        "dim": 32, **{f"{side}_{key}": value for side in ("enc", "dec")
                      for key, value in _PAIRED.items()}}),
    "open_clip:ViT": Entry("open_clip:CLIP", _image_and_text, {**_CLIP, "vision_cfg": {
        "image_size": 64, "layers": 2, "width": 64, "patch_size": 16}}),
    "open_clip:ResNet": Entry("open_clip:CLIP", _image_and_text, {**_CLIP, "vision_cfg": {
        "image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}}),
    "denoising_diffusion:loss": _here(_diffusion_loss, image(16)),
    "perceiver:Perceiver": Entry("perceiver_pytorch:Perceiver", floats((2, 16, 16, 3)), {
        **_PERCEIVER, "num_freq_bands": 2, "max_freq": 4.0, "num_classes": 5}),
    "perceiver:PerceiverIO": Entry("perceiver_pytorch:PerceiverIO", floats((2, 10, 8)), {
        **_PERCEIVER, "dim": 8, "queries_dim": 8}),
    "performer:PerformerLM": Entry("performer_pytorch:PerformerLM", tokens(32), {
        **_LAYERS, "num_tokens": 100, "max_seq_len": 32}),
    "conformer:Conformer": Entry("conformer:Conformer", floats((2, 12, 16)), {
        "dim": 16, "depth": 2, "dim_head": 8, "heads": 2}),
    "mambapy:Mamba": _here(_mamba, floats((2, 12, 16))),
    "neuralop:FNO": Entry("neuralop.models:FNO", image(16, 1), {
        "n_modes": (4, 4), "hidden_channels": 8, "in_channels": 1, "out_channels": 1,
        "n_layers": 2}),
    "mlp_mixer:MLPMixer": Entry("mlp_mixer_pytorch:MLPMixer", image(32), {
        "image_size": 32, "channels": 3, "patch_size": 8, "dim": 16, "depth": 2,
        "num_classes": 5}),
    "g_mlp:gMLPVision": Entry("g_mlp_pytorch:gMLPVision", image(32), {
        "image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 2}),
    "pytorch_tabnet:TabNet": _here(_tabnet, floats((8, 8))),
    "demucs:Demucs": Entry("demucs.demucs:Demucs", floats((1, 2, 8192)), {
        "sources": ["a", "b"], "channels": 8, "depth": 3, "lstm_layers": 1}),
    "timm_3d:resnet18": Entry("timm_3d:create_model", floats((2, 3, 32, 32, 32)),
                              {"pretrained": False}, ("resnet18",)),
    "efficientnet_pytorch:b0": Entry("efficientnet_pytorch:EfficientNet.from_name", image(64),
                                     args=("efficientnet-b0",)),
    **{f"torch_geometric:{name}": Entry(f"torch_geometric.nn:{name}", _graph, _GRAPHS)
       for name in ("GCN", "GAT", "GIN", "GraphSAGE")},
    **{f"ultralytics:{name}": _here(_yolo, image(64, batch=1), name)
       for name in ("yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-cls", "yolov9t",
                    "yolov10n", "yolo11n", "yolo11n-obb")},
}  # fmt: skip

# pytorchcv: one network of each kind --------------------------------------------------------

_AT_224 = (
    "alexnet resnet10 preresnet10 resnext14_16x4d seresnet10 densenet121 condensenet74_c4_g4 "
    "channelnet irevnet301 bagnet9 dla34 espnetv2_wd2 dicenet_wd5 hrnet_w18_small_v1 vovnet27s "
    "selecsls42b hardnet39ds xdensenet121_2 squeezenet_v1_0 squeezeresnet_v1_0 sqnxt23_w1 "
    "shufflenet_g1_wd4 shufflenetv2_wd2 menet108_8x1_g3 mobilenet_wd4 fdmobilenet_wd4 "
    "mobilenetv2_wd4 igcv3_wd4 mnasnet_small darts proxylessnas_cpu fbnet_cb nasnet_4a1056 "
    "spnasnet efficientnet_b0 mixnet_s resneta10 diracnet18v2"
)
_AT_32 = "wrn20_10_1bit_cifar10 rir_cifar10 nin_cifar10 ror3_56_cifar10"
PYTORCHCV = {
    **{
        f"pytorchcv:{name}": _here(_pytorchcv, image(224, batch=1), name)
        for name in _AT_224.split()
    },
    **{f"pytorchcv:{name}": _here(_pytorchcv, image(32, batch=1), name) for name in _AT_32.split()},
}

ENTRIES: dict[str, Entry] = {
    **SEGMENTATION, **DIFFUSION, **VISION_TRANSFORMERS, **MEDICAL, **REST, **PYTORCHCV
}  # fmt: skip
