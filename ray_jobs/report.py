"""`raystill report`: everything a run wrote -> report.html, report.json, comparisons.csv, verdicts.csv (no Ray)."""

from typing import Any

from ray_jobs.core.config import Config
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Write the report of the stages that have finished and return its manifest; one more finished stage makes it anew.

    Raises:
        StageMissing: nothing has been prepared yet.
    """
    from ray_jobs.reporting.comparisons import compare, to_csv, verdicts_to_csv
    from ray_jobs.reporting.page import render
    from ray_jobs.reporting.run_files import finished_stages, read_run
    from ray_jobs.reporting.summary import summarise
    from ray_jobs.reporting.view import page_context

    folder = RunFolder(config)
    folder.finished("prepare")
    stage = folder.stage("report", sections=[], after=finished_stages(folder), force=force)
    if stage.manifest:
        say(f"report: done already in {stage.folder.uri}")
        return stage.manifest
    found = read_run(folder)
    rows = compare(found, tie_band=found.tie_band)
    summary = summarise(found, rows)
    stage.folder.write_json("report.json", summary)
    stage.folder.write_bytes("comparisons.csv", to_csv(rows))
    stage.folder.write_bytes("verdicts.csv", verdicts_to_csv(found.verdicts))
    stage.folder.write_bytes("report.html", render(page_context(found, summary, rows)))
    page = f"{stage.folder.uri}/report.html"
    return stage.finish(
        counts={"questions": len(found.questions), "comparisons": len(rows), "missing": found.missing},
        headline=[summary["answer"], *summary["sentences"], f"report: {page}"],
        next=f"open {page}" if stage.folder.is_local else f"copy {page} here and open it",
    )
