# ctrl and the fine-tuning of diffusion models, from this repository:
#   docker build --tag ctrl .
#   docker run --rm --gpus all --volume "$PWD/runs:/runs" ctrl --reward jpeg-compressibility --output /runs/mine
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN python -m pip install --no-cache-dir --constraint constraints.txt build \
    && python -m build --outdir /dist . \
    && python -m build --wheel --outdir /dist packages/models

FROM python:3.11-slim-bookworm
# A C compiler makes roll-outs and torch.compile fast; numbers are the same without it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /dist/constraints.txt
COPY --from=build /dist /dist
# torch first and pinned, as in the Makefile: it decides what everything else may bring.
RUN python -m pip install --no-cache-dir --constraint /dist/constraints.txt torch \
    && python -m pip install --no-cache-dir --constraint /dist/constraints.txt --find-links /dist "ctrl-diffusion[diffusion,models,ocr,gym,verification]"
RUN useradd --create-home --uid 1000 ctrl && mkdir /runs && chown ctrl /runs
USER 1000
WORKDIR /runs
ENTRYPOINT ["python", "-m", "diffusion_envs.sd15"]
CMD ["--help"]
