"""Semantic segmentation with the U-Net family: UNet, UNet++ and UNet3+ in PyTorch Lightning."""

__version__ = "0.2.0"
