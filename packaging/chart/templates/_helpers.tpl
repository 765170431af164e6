{{/* Name of the application in labels. */}}
{{- define "aws-vpc-cni.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of the objects. */}}
{{- define "aws-vpc-cni.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $release := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $release | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects the pods, with the release; it cannot be changed in a DaemonSet that exists. */}}
{{- define "aws-vpc-cni.selectorLabels" -}}
app.kubernetes.io/name: {{ include "aws-vpc-cni.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "aws-vpc-cni.labels" -}}
{{ include "aws-vpc-cni.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
k8s-app: aws-node
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "aws-vpc-cni.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "aws-vpc-cni.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Reference of an image, of (list root image). */}}
{{- define "aws-vpc-cni.image" -}}
{{- $image := index . 1 -}}
{{- /* A tag or an account written without quotes is a number. */ -}}
{{- $tag := $image.tag | default (index . 0).Chart.AppVersion | toString -}}
{{- if $image.override -}}
{{- $image.override -}}
{{- else if $image.overrideRepository -}}
{{- printf "%s:%s" $image.overrideRepository $tag -}}
{{- else if $image.account -}}
{{- /* toString gives a large number an exponent. */ -}}
{{- $account := ternary ($image.account | int64 | toString) ($image.account | toString) (kindIs "float64" $image.account) -}}
{{- printf "%s.dkr.%s.%s.%s/%s:%s" $account $image.endpoint $image.region $image.domain $image.repository $tag -}}
{{- else -}}
{{- printf "%s:%s" $image.repository $tag -}}
{{- end -}}
{{- end -}}

{{/* Value of a variable of the container aws-node, of (list root name): the last one counts; empty when it is not set. */}}
{{- define "aws-vpc-cni.variable" -}}
{{- $name := index . 1 -}}
{{- $value := get ((index . 0).Values.env | default dict) $name | toString -}}
{{- range (index . 0).Values.extraEnv -}}
{{- if eq .name $name -}}
{{- $value = .value | toString -}}
{{- end -}}
{{- end -}}
{{- $value -}}
{{- end -}}

{{/* "true" if such a variable is on, else empty. */}}
{{- define "aws-vpc-cni.isOn" -}}
{{- if has (include "aws-vpc-cni.variable" .) (list "1" "t" "T" "true" "TRUE" "True") -}}
true
{{- end -}}
{{- end -}}

{{/* A port, or address:port, with a colon. */}}
{{- define "aws-vpc-cni.bindAddress" -}}
{{- $address := . | toString -}}
{{- ternary $address (printf ":%s" $address) (contains ":" $address) -}}
{{- end -}}

{{/* Environment from a map, in the order of the names, all of it text. */}}
{{- define "aws-vpc-cni.env" -}}
{{- $lines := list -}}
{{- range $name, $value := . -}}
{{- $lines = append $lines (printf "- name: %s\n  value: %s" $name ($value | toString | quote)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}
