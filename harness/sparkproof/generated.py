"""Files that are generated from code and committed: each must equal what `documents` gives, and a test holds it to that."""

from __future__ import annotations


def documents() -> dict[str, str]:
    """Path relative to the checkout -> text."""
    from sparkproof.bench.document import bench_schema
    from sparkproof.bench.export.document import export_schema
    from sparkproof.bench.train.document import train_schema
    from sparkproof.checks.catalogue import markdown
    from sparkproof.cli.doctor_document import doctor_schema
    from sparkproof.cli.listing import scenario_schema
    from sparkproof.judge.selftest_export import selftest_schema as selftest_export_schema
    from sparkproof.judge.selftest_train import selftest_schema
    from sparkproof.report.compare import compare_schema
    from sparkproof.report.model import report_schema

    return {
        "scenarios/scenario.schema.json": scenario_schema(),
        "reports/schema/report-1.json": report_schema(),
        "reports/schema/bench-ops-1.json": bench_schema(),
        "reports/schema/bench-train-1.json": train_schema(),
        "reports/schema/bench-export-1.json": export_schema(),
        "reports/schema/selftest-train-1.json": selftest_schema(),
        "reports/schema/selftest-export-1.json": selftest_export_schema(),
        "reports/schema/compare-1.json": compare_schema(),
        "reports/schema/doctor-1.json": doctor_schema(),
        "docs/failures.md": markdown(),
    }
