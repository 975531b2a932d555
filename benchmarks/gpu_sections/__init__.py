"""The sections of benchmarks/gpu_report.py: functions that take a Setting and yield rows."""
