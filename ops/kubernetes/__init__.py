"""The Helm chart (`caravan/`), values for four cases (`values/`), and what of the chart is generated."""
