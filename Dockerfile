# The CPU:       docker build -t unet . && docker run --rm -v "$PWD/runs:/work/runs" unet
# NVIDIA GPUs:   docker build -t unet --build-arg TORCH=cu128 .
#                docker run --rm --gpus all --ipc host -v "$PWD/runs:/work/runs" -v /path/to/data:/data unet \
#                    python src/train.py --config configs/trainer/gpu.yaml
# --ipc host: loader workers hand over batches in shared memory, of which Docker gives 64 MB.
FROM python:3.12-slim
ARG TORCH=cpu
# torch.compile needs a compiler; a run records its commit by git.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /work
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/$TORCH"
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . ./
CMD ["python", "src/train.py"]
