"""An image's embedding has the same bits whatever stands beside it, for trunks of many kinds.

Bare timm does not promise it: the second test shows where a batch of another size, or more threads, give other bits,
which is why `tower.embed` has batches of one shape and one thread.
"""

import pytest
import timm
import torch

from hf_timm_tower import TimmModel

TRUNKS = (
    "test_resnet", "test_vit", "test_mambaout", "test_coatnet", "mobilenetv3_small_050", "efficientvim_m1",
    "convnext_atto", "levit_128s", "regnety_002", "pvt_v2_b0",
)  # fmt: skip
MORE = (
    "swin_tiny_patch4_window7_224", "resmlp_12_224", "xcit_nano_12_p8_224", "ghostnet_050", "edgenext_xx_small",
    "poolformer_s12", "efficientnet_b0", "hrnet_w18_small", "resnet18", "vit_tiny_patch16_224", "maxvit_tiny_rw_224",
)  # fmt: skip
# Of the trunks above, on one x86-64 machine with AVX-512: bare timm gives other last bits
OTHER_BITS_ALONE = "test_mambaout"  # for an image alone than in a batch of four


@pytest.mark.parametrize("name", [*TRUNKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_bits_of_an_image_depend_on_the_image_alone(name: str) -> None:
    tower = TimmModel(name, embed_dim=8).eval()
    channels, height, width = tower.config.in_chans, *tower.config.image_size
    images = torch.randint(0, 256, (6, channels, height, width), dtype=torch.uint8)

    def embed(rows: list[int], **options: int) -> torch.Tensor:
        return tower.embed([images[row] for row in rows], progress=False, **{"num_workers": 0, **options})

    everything = embed([0, 1, 2, 3, 4, 5], num_workers=2)
    assert torch.equal(embed([3]), everything[[3]]), "alone"
    assert torch.equal(embed([5, 3, 0]), everything[[5, 3, 0]]), "in other places, beside others"


def test_bare_timm_gives_other_bits_for_batches_of_other_sizes() -> None:
    trunk = timm.create_model(OTHER_BITS_ALONE, num_classes=0).eval()
    images = torch.randn(4, *trunk.pretrained_cfg["input_size"])
    with torch.no_grad():
        together, alone = trunk(images), torch.cat([trunk(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
    if torch.equal(together, alone):
        pytest.skip("not on this machine")
