FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0

RUN useradd --system --uid 10001 nutshell \
    && install --directory --owner=nutshell /data

# Packages change rarely and come first; what stands below "# tests" stays out. For PostgreSQL and Redis
# build with --build-arg EXTRAS="asyncpg==0.32.0 redis==8.1.0".
ARG EXTRAS=""
COPY requirements.txt /app/
RUN sed '/^# tests/,$d' /app/requirements.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt $EXTRAS \
    && rm /tmp/requirements.txt
COPY main.py /app/

# The database is made in /data, and SQLite's temporary files too: the root may be read-only.
ENV TMPDIR=/data
WORKDIR /data
USER nutshell
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=10s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health', timeout=3)"]
CMD ["python", "/app/main.py"]
