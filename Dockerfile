# For CPUs:  docker build -t ijepa_fast . && docker run --rm -v "$PWD":/work ijepa_fast pretrain --config demo
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c /src/constraints.txt "/src[train,shards,huggingface]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["ijepa-fast"]
