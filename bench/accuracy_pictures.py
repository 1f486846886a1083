def describe(study, figures, options):
    from .accuracy import Table, report

    return report(Table(figures)) if study == "main" else study
