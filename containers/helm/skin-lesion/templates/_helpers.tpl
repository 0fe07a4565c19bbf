{{- define "skin-lesion.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Labels of a component: (list ROOT COMPONENT) */}}
{{- define "skin-lesion.selector" -}}
app.kubernetes.io/name: skin-lesion
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "skin-lesion.labels" -}}
{{ include "skin-lesion.selector" . }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion }}
helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end }}

{{/* An image that docker-compose.yml builds: (list ROOT NAME) */}}
{{- define "skin-lesion.image" -}}
{{- $images := (index . 0).Values.images -}}
image: {{ with $images.registry }}{{ . }}/{{ end }}skin-lesion/{{ index . 1 }}:{{ $images.tag }}
imagePullPolicy: {{ $images.pullPolicy }}
{{- end }}

{{/* Restricted pod security; the volumes belong to the group of the user: (list ROOT USER) */}}
{{- define "skin-lesion.pod" -}}
{{- $root := index . 0 -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ index . 1 | int }}
  runAsGroup: {{ index . 1 | int }}
  fsGroup: {{ index . 1 | int }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "skin-lesion.confined" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The value of a key of a Secret, as an environment variable: (list NAME SECRET KEY) */}}
{{- define "skin-lesion.secret" -}}
- name: {{ index . 0 }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}}
{{- end }}

{{/* A claim for a volume: (list NAME STORAGE) */}}
{{- define "skin-lesion.claim" -}}
- metadata: {name: {{ index . 0 }}}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with (index . 1).className }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ (index . 1).size }}}}
{{- end }}

{{- define "skin-lesion.postgres" -}}
{{- if .Values.postgres.inside }}{{ include "skin-lesion.name" . }}-postgres{{ else }}{{ required "Set postgres.host, because postgres.inside is false." .Values.postgres.host }}{{ end }}:{{ .Values.postgres.port }}
{{- end }}

{{- define "skin-lesion.store" -}}
{{- if .Values.store.inside }}http://{{ include "skin-lesion.name" . }}-minio:9000{{ else }}{{ .Values.store.endpoint }}{{ end }}
{{- end }}

{{- define "skin-lesion.registry" -}}
http://{{ include "skin-lesion.name" . }}-mlflow:5001
{{- end }}

{{/* A container that waits until MLflow answers, with its database: ROOT */}}
{{- define "skin-lesion.wait-for-mlflow" -}}
- name: wait-for-mlflow
  {{- include "skin-lesion.image" (list . "promoter") | nindent 2 }}
  command: [sh, -c]
  args:
    - until python containers/healthcheck.py "{{ include "skin-lesion.registry" . }}/api/2.0/mlflow/experiments/get?experiment_id=0"; do sleep 2; done
  {{- include "skin-lesion.confined" . | nindent 2 }}
  resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {memory: 256Mi}}
{{- end }}
