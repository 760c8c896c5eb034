"""Examine data and machine before training: what is there, what is wrong, and the YAML that mends it.

python src/doctor.py --config configs/data/camvid.yaml
python src/doctor.py --data.dataset FolderData --data.dataset.root /path/to/my_data   no classes yet: it suggests some
python src/doctor.py --config configs/model/unet_resnet34.yaml --prefetch             weights, for a cluster
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.doctor:main")
