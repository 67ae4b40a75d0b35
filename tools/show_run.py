"""Print the result table of a finished run, and where its report is."""
import sys
from pathlib import Path

import nbconvert
import pandas as pd


def main(folder: str) -> int:
    """Print `table.csv` of a run folder; 1 when the run did not finish."""
    run = Path(folder)
    if not (run / "manifest.json").is_file():
        print(f"{run}: no manifest.json, so this run did not finish; run it again and it goes on where it stopped", file=sys.stderr)
        return 1
    html, _ = nbconvert.HTMLExporter().from_filename(str(run / "notebook.ipynb"))
    report = run / "report.html"
    report.write_text(html, encoding="utf-8")
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_colwidth", 60):
        print(pd.read_csv(run / "table.csv").to_string(index=False))
    print(f"\nreport:   {report}\nnotebook: {run / 'notebook.ipynb'}\nrun:      {run}/ (settings, predictions, answers, judge calls, scores, table, manifest)")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
