"""`python -m bench.report RUN.json [OTHER.json ...]`; see `bench.report.rendering`."""

from bench.report.rendering import main

if __name__ == "__main__":
    main()
