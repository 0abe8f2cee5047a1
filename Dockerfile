FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    DATABASE_URL=sqlite+aiosqlite:////data/app.db

RUN useradd --system --uid 10001 nutshell \
    && install --directory --owner=nutshell /data
WORKDIR /app

# Packages change rarely and come first; what stands below "# tests" stays out. For PostgreSQL and Redis
# build with --build-arg EXTRAS="asyncpg redis".
ARG EXTRAS=""
COPY requirements.txt .
RUN sed '/^# tests/,$d' requirements.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt $EXTRAS \
    && rm /tmp/requirements.txt
COPY main.py .

# The root may be read-only: SQLite's temporary files go where the database is.
ENV TMPDIR=/data
USER nutshell
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=10s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health', timeout=3)"]
CMD ["python", "main.py"]
