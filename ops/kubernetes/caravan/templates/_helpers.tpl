{{- define "caravan.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "caravan.labels" -}}
app.kubernetes.io/name: caravan
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* How long a pod may take to go: its streams are handed over or end, then Ray stops. */}}
{{- define "caravan.drain" -}}
{{- $resources := .Values.args.resources | default dict -}}
{{- int (get $resources "drain_timeout_s" | default 600) -}}
{{- end }}

{{/* The Serve configuration, with what follows from the chart. */}}
{{- define "caravan.serve" -}}
{{- $workers := 0 -}}
{{- range .Values.workers }}{{ $workers = add $workers .replicas }}{{ end -}}
{{- $args := deepCopy .Values.args -}}
{{- $gateway := $args.gateway | default dict -}}
{{- if not (hasKey $gateway "replicas") }}{{ $gateway = set $gateway "replicas" (int $workers) }}{{ end -}}
{{- $_ := set $args "gateway" $gateway -}}
{{- if .Values.auth.keysSecret -}}
{{- $_ := set $args "auth" (merge (dict "required" true "keys_env" "CARAVAN_KEYS") ($args.auth | default dict)) -}}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.port }}
logging_config:
  encoding: JSON
  log_level: WARNING
  enable_access_log: false
applications:
  - name: caravan
    route_prefix: /
    import_path: deployments.app:build
    args:
      {{- toYaml $args | nindent 6 }}
    {{- with .Values.deployments }}
    deployments:
      {{- toYaml . | nindent 6 }}
    {{- range . }}
    {{- if .autoscaling_config }}
    autoscaling_policy: {policy_function: "deployments.routing.autoscaling:follow_demand"}
    {{- break }}
    {{- end }}
    {{- end }}
    {{- end }}
{{- end }}

{{/* Environment of every pod: ops/runbook.md says what each is for. */}}
{{- define "caravan.environment" -}}
{{- $own := dict
  "RAY_health_check_initial_delay_ms" "1000"
  "RAY_health_check_period_ms" "500"
  "RAY_health_check_timeout_ms" "2500"
  "RAY_health_check_failure_threshold" "3"
  "RAY_core_worker_rpc_server_reconnect_timeout_base_s" "0"
  "RAY_grpc_client_check_connection_status_interval_milliseconds" "100"
  "RAY_gcs_rpc_server_reconnect_timeout_s" "300"
  "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S" "1"
  "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S" "3"
  "RAY_SERVE_ENABLE_HA_PROXY" (ternary "1" "0" .Values.serve.haproxy)
  "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S" "60"
  "RAY_SERVE_HAPROXY_MAXCONN" "20000"
  "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" (include "caravan.drain" .)
  "RAY_USAGE_STATS_ENABLED" "0"
-}}
{{- range $name, $value := merge (deepCopy .Values.env) $own }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- if .Values.auth.keysSecret }}
- name: CARAVAN_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.keysSecret }}
      key: keys.yaml
{{- end }}
{{- end }}

{{/* What containers of all pods have in common. */}}
{{- define "caravan.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (toString .Values.image.tag) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
env:
  {{- include "caravan.environment" . | nindent 2 }}
lifecycle:
  preStop: # answers through this pod end, Ray moves what runs here and streams with it, then the node ends by itself
    exec:
      command: [python, -m, ops.drain, --port, {{ .Values.serve.port | quote }}, --timeout, {{ include "caravan.drain" . | quote }}]
livenessProbe: # of the raylet, by Ray's own agent
  httpGet:
    path: /api/local_raylet_healthz
    port: 52365
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
startupProbe:
  httpGet:
    path: /api/local_raylet_healthz
    port: 52365
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
{{- end }}

{{- define "caravan.pod" -}}
terminationGracePeriodSeconds: {{ add (mul 2 (include "caravan.drain" . | int)) 60 }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
