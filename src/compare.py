"""Compare finished runs from the files in their folders: IoU per class with intervals, differences, config, cost.

python src/compare.py unet unetpp unet3p                               names of runs, or their folders
python src/compare.py runs/unet runs/unetpp --output nets.png

Intervals are those of a bootstrap over the tested images; differences are to the first run, on the same images.
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.compare:compare")
