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

{{- define "onebit.selectorLabels" -}}
app.kubernetes.io/name: {{ include "onebit.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "onebit.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "onebit.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "onebit.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "onebit.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "onebit.image" -}}
{{- $build := ternary "cuda" "cpu" .Values.server.gpu.enabled -}}
{{- $tag := .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion $build) -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "onebit.claim" -}}
{{- .Values.artifacts.existingClaim | default (printf "%s-artifacts" (include "onebit.fullname" .)) -}}
{{- end -}}

{{- define "onebit.gpuResource" -}}
{{- with .Values.server.gpu -}}
{{- if .migProfile -}}nvidia.com/mig-{{ .migProfile }}{{- else -}}{{ .resourceName }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* The first combination that cannot work ends the rendering, with what to change. */}}
{{- define "onebit.check" -}}
{{- $server := .Values.server -}}
{{- if not .Values.auth.existingSecret -}}
{{- fail "auth.existingSecret is empty: in a pod the server listens for other machines and starts only with a keys file; make one with `onebit-serve keys add --file keys.json --id me --scope inference`, then `kubectl create secret generic onebit-keys --from-file=keys.json`, and set auth.existingSecret=onebit-keys" -}}
{{- end -}}
{{- if and .Values.jobs.enabled (gt (int $server.replicaCount) 1) -}}
{{- fail (printf "server.replicaCount is %d but jobs are recorded in an SQLite file, which has one writer: set jobs.enabled=false or server.replicaCount=1" (int $server.replicaCount)) -}}
{{- end -}}
{{- if and .Values.jobs.enabled .Values.artifacts.readOnly -}}
{{- fail "artifacts.readOnly is true but jobs write their artifacts there: set jobs.enabled=false or artifacts.readOnly=false" -}}
{{- end -}}
{{- if and (not .Values.jobs.enabled) (or .Values.jobs.sourcesClaim .Values.jobs.allowHub) -}}
{{- fail "jobs.sourcesClaim or jobs.allowHub is set but jobs.enabled is false: nothing would use it" -}}
{{- end -}}
{{- if and (gt (int $server.replicaCount) 1) (not .Values.artifacts.existingClaim) (not (or (has "ReadOnlyMany" .Values.artifacts.accessModes) (has "ReadWriteMany" .Values.artifacts.accessModes))) -}}
{{- fail (printf "server.replicaCount is %d but the artifacts claim is %s, which one node can mount: set artifacts.accessModes=[ReadWriteMany] or [ReadOnlyMany], or artifacts.existingClaim" (int $server.replicaCount) (join ", " .Values.artifacts.accessModes)) -}}
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
