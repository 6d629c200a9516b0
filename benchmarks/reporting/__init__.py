"""From result files to a report: verdict, ladder, operating point, charts, pictures, wording."""
