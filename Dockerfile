# SparseOcc with its CUDA extensions, for machines with an NVIDIA GPU (driver for CUDA 13).
#
#   docker build -t sparseocc .
#   docker run --gpus all --ipc=host -it -v /path/to/nuscenes:/sparseocc/data/nuscenes sparseocc
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv build-essential git \
    libturbojpeg \
 && rm -rf /var/lib/apt/lists/*

ENV VENV=/opt/venv PYTHON=python3.12 PATH=/opt/venv/bin:$PATH
WORKDIR /sparseocc

# The environment first: it changes less often than the code.
COPY Makefile ./
COPY requirements requirements
COPY setup.py setup.py
COPY tools/install.py tools/install.py
COPY tools/setup_shim tools/setup_shim
COPY tools/package tools/package
COPY lib lib
RUN make install

COPY . .
RUN TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0;10.0" make build-ops

CMD ["bash"]
