# An image for GPU nodes: docker build -t vlm_repro .
# It installs what a checkout installs, with the same make target, so the packages are those of constraints.txt. Their wheels bring CUDA's
# libraries along; the image adds the compiler that DeepSpeed builds its operations with, of the same major version.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=train,metrics
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/vlm_repro
COPY . .
RUN make install EXTRAS=${EXTRAS}

# The checkout belongs to root and runs belong to whoever starts them: git may read its commit all the same, for the manifest.
RUN git config --system --add safe.directory /opt/vlm_repro
ENV PATH=/opt/vlm_repro/.venv/bin:${PATH}
WORKDIR /runs
ENTRYPOINT ["vlm-repro"]
CMD ["doctor", "--deep"]
