"""Train a segmentation net, test its best checkpoint, and say where the run folder is.

python src/train.py                                                     generated images, nothing to download
python src/train.py --config configs/data/camvid.yaml --name camvid     a data set of yours: copy its overlay
python src/train.py --config configs/trainer/ddp.yaml                   every GPU of this machine
torchrun --nproc-per-node 8 src/train.py --config configs/trainer/ddp.yaml --name big --resume
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.training.cli:train")
