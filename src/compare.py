"""Compare finished runs from the files in their folders: IoU per class with intervals, differences, config, cost.

python src/compare.py unet unetpp unet3p
python src/compare.py runs/unet runs/unetpp --output comparison --wandb
"""

from segmentation.errors import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.comparing:compare")
