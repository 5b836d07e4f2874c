{{- define "onebit.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* One name for everything of a release; a release called "onebit" is not called "onebit-onebit". */}}
{{- define "onebit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "onebit.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "onebit.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "onebit.releaseLabels" -}}
app.kubernetes.io/name: {{ include "onebit.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "onebit.selectorLabels" -}}
{{ include "onebit.releaseLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "onebit.workerSelectorLabels" -}}
{{ include "onebit.releaseLabels" . }}
app.kubernetes.io/component: worker
{{- end -}}

{{- define "onebit.chartLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "onebit.labels" -}}
{{ include "onebit.selectorLabels" . }}
{{ include "onebit.chartLabels" . }}
{{- end -}}

{{- define "onebit.workerLabels" -}}
{{ include "onebit.workerSelectorLabels" . }}
{{ include "onebit.chartLabels" . }}
{{- end -}}

{{- define "onebit.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "onebit.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The image of a part, server or worker: (list $ $part). */}}
{{- define "onebit.image" -}}
{{- $root := index . 0 -}}
{{- $build := ternary "cuda" "cpu" (index . 1).gpu.enabled -}}
{{- $tag := $root.Values.image.tag | default (printf "%s-%s" $root.Chart.AppVersion $build) -}}
{{- printf "%s:%s" $root.Values.image.repository $tag -}}
{{- with $root.Values.image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "onebit.claim" -}}
{{- .Values.artifacts.existingClaim | default (printf "%s-artifacts" (include "onebit.fullname" .)) -}}
{{- end -}}

{{/* What a container of a part asks for, with its GPU or the slice of one. */}}
{{- define "onebit.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpu.enabled -}}
{{- $name := ternary (printf "nvidia.com/mig-%s" .gpu.migProfile) .gpu.resourceName (ne .gpu.migProfile "") -}}
{{- $gpu := dict $name 1 -}}
{{- $resources = mergeOverwrite $resources (dict "requests" $gpu "limits" (deepCopy $gpu)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Where the pods of a part run and as whom: (list $ $part). */}}
{{- define "onebit.placement" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
serviceAccountName: {{ include "onebit.serviceAccountName" $root }}
automountServiceAccountToken: {{ $root.Values.serviceAccount.automount }}
# Kubernetes would set ONEBIT_PORT=tcp://... for a Service named onebit, over the server's own variable.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $part.terminationGracePeriodSeconds }}
securityContext: {{- toYaml $part.podSecurityContext | nindent 2 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $part.gpu.enabled $part.tolerations }}
tolerations:
  {{- if $part.gpu.enabled }}
  - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
  {{- end }}
  {{- with $part.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The volumes that server and worker share: (list $ $part). */}}
{{- define "onebit.volumes" -}}
{{- $root := index . 0 -}}
{{- $values := $root.Values -}}
- name: artifacts
  persistentVolumeClaim: {claimName: {{ include "onebit.claim" $root }}}
- name: keys
  secret:
    secretName: {{ $values.auth.existingSecret | quote }}
    optional: false
    defaultMode: 0440
    items: [{key: {{ $values.auth.keysKey | quote }}, path: keys.json}]
{{- if and $values.jobs.enabled (eq $values.jobs.database.kind "postgres") }}
- name: database
  secret:
    secretName: {{ $values.jobs.database.existingSecret | quote }}
    optional: false
    defaultMode: 0440
    items: [{key: {{ $values.jobs.database.urlKey | quote }}, path: url}]
{{- end }}
- name: temporary
  emptyDir: {sizeLimit: {{ (index . 1).temporarySize }}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: 1Gi}
{{- with $values.jobs.sourcesClaim }}
- name: sources
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "onebit.volumeMounts" -}}
- {name: artifacts, mountPath: /artifacts, readOnly: {{ .Values.artifacts.readOnly }}}
- {name: keys, mountPath: /etc/onebit/keys, readOnly: true}
{{- if and .Values.jobs.enabled (eq .Values.jobs.database.kind "postgres") }}
- {name: database, mountPath: /etc/onebit/database, readOnly: true}
{{- end }}
- {name: temporary, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.jobs.sourcesClaim }}
- {name: sources, mountPath: /sources, readOnly: true}
{{- end }}
{{- end -}}

{{/* The first combination that cannot work ends the rendering, with what to change. */}}
{{- define "onebit.check" -}}
{{- $server := .Values.server -}}
{{- if not .Values.auth.existingSecret -}}
{{- fail "auth.existingSecret is empty: in a pod the server listens for other machines and starts only with a keys file; make one with `onebit-serve keys add --file keys.json --id me --scope inference`, then `kubectl create secret generic onebit-keys --from-file=keys.json`, and set auth.existingSecret=onebit-keys" -}}
{{- end -}}
{{- $replicas := int (ternary $server.replicaCount $server.autoscaling.maxReplicas (eq $server.autoscaling.kind "none")) -}}
{{- $counted := ternary "server.replicaCount" "server.autoscaling.maxReplicas" (eq $server.autoscaling.kind "none") -}}
{{- $postgres := eq .Values.jobs.database.kind "postgres" -}}
{{- if and .Values.jobs.enabled (gt $replicas 1) (not $postgres) -}}
{{- fail (printf "%s is %d but jobs are recorded in an SQLite file, which has one writer: set jobs.database.kind=postgres, jobs.enabled=false or one replica" $counted $replicas) -}}
{{- end -}}
{{- if and .Values.jobs.enabled $postgres (not .Values.jobs.database.existingSecret) -}}
{{- fail "jobs.database.kind is postgres but jobs.database.existingSecret is empty: make one with `kubectl create secret generic onebit-database --from-literal=url=postgresql://USER:PASSWORD@HOST:5432/NAME`" -}}
{{- end -}}
{{- if and (not $postgres) .Values.jobs.database.existingSecret -}}
{{- fail "jobs.database.existingSecret is set but jobs.database.kind is sqlite: nothing would read it; set jobs.database.kind=postgres" -}}
{{- end -}}
{{- if and .Values.worker.enabled (not .Values.jobs.enabled) -}}
{{- fail "worker.enabled is true but jobs.enabled is false: there would be nothing to do" -}}
{{- end -}}
{{- if and .Values.worker.enabled (not $postgres) -}}
{{- fail "worker.enabled is true but jobs are recorded in an SQLite file, which the server's pod alone may open: set jobs.database.kind=postgres" -}}
{{- end -}}
{{- if and (gt (int $server.autoscaling.minReplicas) (int $server.autoscaling.maxReplicas)) (ne $server.autoscaling.kind "none") -}}
{{- fail (printf "server.autoscaling.minReplicas is %d, over maxReplicas, %d" (int $server.autoscaling.minReplicas) (int $server.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $server.autoscaling.kind "keda") (not $server.autoscaling.prometheusAddress) -}}
{{- fail "server.autoscaling.kind is keda but prometheusAddress is empty: name the Prometheus that scrapes the servers, for example http://prometheus.monitoring:9090" -}}
{{- end -}}
{{- if and .Values.worker.gpu.migProfile (not .Values.worker.gpu.enabled) -}}
{{- fail (printf "worker.gpu.migProfile is %s but worker.gpu.enabled is false: the worker would get no GPU" .Values.worker.gpu.migProfile) -}}
{{- end -}}
{{- if and $server.gpu.migProfile (not $server.gpu.enabled) -}}
{{- fail (printf "server.gpu.migProfile is %s but server.gpu.enabled is false: the pod would get no GPU" $server.gpu.migProfile) -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled is true but httpRoute.parentRefs is empty: name the gateway" -}}
{{- end -}}
{{- if and .Values.adminService.enabled (or (hasPrefix "/admin" .Values.ingress.path) (hasPrefix "/admin" .Values.httpRoute.path)) -}}
{{- fail "ingress.path or httpRoute.path is /admin but /admin has a port of its own: set adminService.enabled=false" -}}
{{- end -}}
{{- if and .Values.jobs.enabled .Values.artifacts.readOnly -}}
{{- fail "artifacts.readOnly is true but jobs write their artifacts there: set jobs.enabled=false or artifacts.readOnly=false" -}}
{{- end -}}
{{- if and (not .Values.jobs.enabled) (or .Values.jobs.sourcesClaim .Values.jobs.allowHub) -}}
{{- fail "jobs.sourcesClaim or jobs.allowHub is set but jobs.enabled is false: nothing would use it" -}}
{{- end -}}
{{- $pods := add $replicas (ternary (int .Values.worker.replicaCount) 0 .Values.worker.enabled) -}}
{{- if and (gt $pods 1) (not .Values.artifacts.existingClaim) (not (or (has "ReadOnlyMany" .Values.artifacts.accessModes) (has "ReadWriteMany" .Values.artifacts.accessModes))) -}}
{{- fail (printf "up to %d pods mount the artifacts but their claim is %s, which one node can mount: set artifacts.accessModes=[ReadWriteMany], [ReadOnlyMany] where no jobs run, or artifacts.existingClaim" $pods (join ", " .Values.artifacts.accessModes)) -}}
{{- end -}}
{{- if and .Values.jobs.enabled (not .Values.artifacts.existingClaim) (not (or (has "ReadWriteOnce" .Values.artifacts.accessModes) (has "ReadWriteOncePod" .Values.artifacts.accessModes) (has "ReadWriteMany" .Values.artifacts.accessModes))) -}}
{{- fail "artifacts.accessModes is [ReadOnlyMany] but jobs write there: set jobs.enabled=false or artifacts.accessModes=[ReadWriteMany]" -}}
{{- end -}}
{{- if and $server.gpu.enabled (eq $server.engine.device "cpu") -}}
{{- fail "server.gpu.enabled is true but server.engine.device is cpu: the GPU would idle; set one or the other" -}}
{{- end -}}
{{- if and (not $server.gpu.enabled) (hasPrefix "cuda" $server.engine.device) -}}
{{- fail (printf "server.engine.device is %s but server.gpu.enabled is false: the pod would get no GPU" $server.engine.device) -}}
{{- end -}}
{{- if le (int $server.terminationGracePeriodSeconds) (int (add $server.preStopSeconds $server.shutdownGraceSeconds)) -}}
{{- fail (printf "server.terminationGracePeriodSeconds is %d but preStopSeconds and shutdownGraceSeconds take %d: streams would be cut off; make it longer" (int $server.terminationGracePeriodSeconds) (int (add $server.preStopSeconds $server.shutdownGraceSeconds))) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled is true but ingress.host is empty: name the host" -}}
{{- end -}}
{{- end -}}
